// node:http: `node node.js PORT`.
"use strict";
const http = require("node:http");
const { randomUUID, timingSafeEqual } = require("node:crypto");

const TOKEN = Buffer.from("Bearer a-token-for-the-bench-alone"); // that of copepod.json
const WORD = "A copepod is small. ";

function allowed(authorization) {
  const given = Buffer.from(authorization || "");
  return given.length === TOKEN.length && timingSafeEqual(given, TOKEN);
}

async function* reply(message) {
  const [count, pause] = message.split(" ").map(Number);
  for (let n = 0; n < count; n++) {
    if (pause) await new Promise((resolve) => setTimeout(resolve, pause));
    yield WORD;
  }
}

async function* events(model, text) {
  const chunk = { id: `chatcmpl_${randomUUID()}`, object: "chat.completion.chunk", model };
  chunk.created = Math.floor(Date.now() / 1000);
  const event = (delta, finish_reason) => {
    chunk.choices = [{ index: 0, delta, finish_reason }];
    return `data: ${JSON.stringify(chunk)}\n\n`;
  };
  yield event({ role: "assistant", content: "" }, null);
  for await (const word of reply(text)) yield event({ content: word }, null);
  yield event({}, "stop");
  yield "data: [DONE]\n\n";
}

async function completion(model, text) {
  let content = "";
  for await (const word of reply(text)) content += word;
  return JSON.stringify({
    id: `chatcmpl_${randomUUID()}`,
    object: "chat.completion",
    created: Math.floor(Date.now() / 1000),
    model,
    choices: [{ index: 0, message: { role: "assistant", content }, finish_reason: "stop" }],
    usage: { prompt_tokens: 0, completion_tokens: 0, total_tokens: 0 },
  });
}

async function answer(request, response) {
  let body = "";
  request.setEncoding("utf8");
  for await (const part of request) body += part;
  if (request.url !== "/v1/chat/completions" || !allowed(request.headers.authorization)) {
    response.writeHead(401, { "Content-Type": "application/json" }).end('{"error":{}}');
    return;
  }
  const { model, messages, stream } = JSON.parse(body);
  const text = messages.at(-1).content;
  if (!stream) {
    const data = await completion(model, text);
    response.writeHead(200, { "Content-Type": "application/json", "Content-Length": Buffer.byteLength(data) });
    response.end(data);
    return;
  }
  response.writeHead(200, { "Content-Type": "text/event-stream" });
  for await (const event of events(model, text)) {
    if (response.destroyed) return;
    if (!response.write(event)) await new Promise((resolve) => response.once("drain", resolve));
  }
  response.end();
}

http.createServer(answer).listen(Number(process.argv[2]), "127.0.0.1", 1024);
