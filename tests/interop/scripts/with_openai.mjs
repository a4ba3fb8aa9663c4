// OpenAI's client for Node: `with_openai.mjs URL TOKEN` prints what it saw, as JSON.

import OpenAI from "openai";

const [baseURL, apiKey] = process.argv.slice(2);
const client = new OpenAI({ baseURL, apiKey, maxRetries: 0, timeout: 20000 });

const ask = (agent, more) => ({
  model: `copepod:${agent}`,
  messages: [{ role: "user", content: "one two three" }],
  ...more,
});

const error = (asked) =>
  asked.then(
    (answer) => answer.choices[0].message.content,
    (e) => `${e.constructor.name} ${e.status} ${e.code}`,
  );

const usage = (counts) => [counts.prompt_tokens, counts.completion_tokens, counts.total_tokens];

const completions = client.chat.completions;
const answer = await completions.create(ask("main"));
const chunks = [];
for await (const chunk of await completions.create(
  ask("main", { stream: true, stream_options: { include_usage: true } }),
)) {
  chunks.push(chunk);
}

const endless = await completions.create(ask("endless", { stream: true }));
for await (const _ of endless) {
  break; // ends the request
}
const left = (await completions.create(ask("ended"))).choices[0].message.content;

const controller = new AbortController();
const aborted = await completions.create(ask("endless", { stream: true }), { signal: controller.signal });
await aborted[Symbol.asyncIterator]().next();
controller.abort();

const models = [];
for await (const model of client.models.list()) {
  models.push(model.id);
}

console.log(
  JSON.stringify({
    answer: answer.choices[0].message.content,
    usage: usage(answer.usage),
    finish: answer.choices[0].finish_reason,
    stream: chunks.map((chunk) => chunk.choices[0]?.delta.content).filter(Boolean),
    "usage of the stream": usage(chunks.at(-1).usage),
    "wrong key": await error(client.withOptions({ apiKey: "wrong" }).chat.completions.create(ask("main"))),
    "unknown agent": await error(completions.create(ask("nobody"))),
    left,
    aborted: (await completions.create(ask("ended"))).choices[0].message.content,
    models,
  }),
);
