// OpenAI's client for Node with tools and images: `tools_with_openai.mjs URL TOKEN` prints what it saw, as JSON.

import OpenAI from "openai";

const [baseURL, apiKey] = process.argv.slice(2);
const { completions } = new OpenAI({ baseURL, apiKey, maxRetries: 0, timeout: 20000 }).chat;

const weather = { name: "weather", parse: JSON.parse, function: ({ at }) => `${at}: sun.`, parameters: {} };
const question = { role: "user", content: "How is the weather in Oslo and in Rome?" };
const asked = { model: "copepod", messages: [question], tools: [{ type: "function", function: weather }] };
const image = { type: "image_url", image_url: { url: "https://a.example/b.png" } };

// It calls the tools itself, until there is an answer.
const answer = (stream) => completions.runTools({ ...asked, stream }).finalContent();

const look = async (stream) => {
  const given = { model: "copepod", stream, messages: [{ role: "user", content: [image] }] };
  if (!stream) return (await completions.create(given)).choices[0].message.content;
  return await completions.stream(given).finalContent();
};

const answers = [await answer(false), await answer(true)];
console.log(JSON.stringify({ answers, seen: [await look(false), await look(true)] }));
