// Another maker's model server: it asks for two calls, tells what they gave, and names the images that it is shown.
// It prints its address; what came to it is in its journal.

import { LLMock } from "@copilotkit/aimock";

const mock = new LLMock({ port: 0, strict: true, chunkSize: 5 });
const call = (at) => ({ id: `call_${at.toLowerCase()}`, name: "weather", arguments: { at } });
const results = ({ messages }) => messages.filter(({ role }) => role === "tool").map(({ content }) => content);
const images = ({ messages }) => {
  const { content } = messages.at(-1);
  return Array.isArray(content) ? content.flatMap((part) => part.image_url?.url ?? []) : [];
};

mock.on({ toolName: "weather", hasToolResult: true }, (request) => ({ content: results(request).join(" ") }));
mock.on({ toolName: "weather" }, { reasoning: "Two calls, I think.", toolCalls: [call("Oslo"), call("Rome")] });
mock.on({ predicate: (request) => images(request).length > 0 }, (request) => ({ content: images(request).join(" ") }));
mock.on({ userMessage: "Are you busy?", sequenceIndex: 0 }, { status: 429, error: { message: "Later." } });
mock.on({ userMessage: "Are you busy?" }, { content: "Not any more." });
console.log(await mock.start());
