// A client of the gateway protocol: `ws_client.mjs KIND URL TOKEN MILLISECONDS`; prints what it has seen, as JSON.
// KIND is `ws` (the package, of the folder that it runs in) or `built in`; for so long the client only answers pings.

const [kind, url, token, milliseconds] = process.argv.slice(2);
const Socket = kind === "ws" ? (await import("ws")).WebSocket : WebSocket;
const MAX = 524288;

class Line {
  #frames = [];
  #wake = () => {};
  constructor() {
    this.socket = new Socket(url);
    this.closed = new Promise((resolve) => {
      this.socket.addEventListener("close", (event) => {
        resolve([event.code, event.reason]);
        this.#frames.push(null);
        this.#wake();
      });
    });
    this.socket.addEventListener("message", (event) => {
      this.#frames.push(JSON.parse(event.data));
      this.#wake();
    });
    this.socket.addEventListener("error", () => {}); // the end tells
  }

  async receive() {
    while (this.#frames.length === 0) await new Promise((resolve) => (this.#wake = resolve));
    return this.#frames.shift();
  }

  async until(wanted) {
    for (;;) {
      const frame = await this.receive();
      if (frame === null) throw new Error(`closed: ${await this.closed}`);
      if (wanted(frame)) return frame;
    }
  }

  request(method, id, params) {
    this.socket.send(JSON.stringify({ type: "req", id, method, params }));
    return this.until((frame) => frame.id === id);
  }

  connect(secret) {
    const client = { id: "interop", version: "1", platform: "linux", mode: "test" };
    return this.request("connect", "c", { minProtocol: 3, maxProtocol: 3, client, auth: { token: secret } });
  }

  event(name) {
    return this.until((frame) => frame.event === name);
  }
}

const seen = { deltas: "", phases: [], pong: null, ticks: 0 };

const line = new Line();
seen.challenge = Object.keys((await line.event("connect.challenge")).payload).sort();
seen.extensions = line.socket.extensions;
seen.protocol = line.socket.protocol;
seen.hello = (await line.connect(token)).payload.type;
seen.accepted = (await line.request("agent", "a", { message: "one two three", idempotencyKey: "k" })).payload.status;
const final = await line.until((frame) => {
  if (frame.event === "agent") {
    seen.deltas += frame.payload.data.delta ?? "";
    if (frame.payload.data.phase) seen.phases.push(frame.payload.data.phase);
  }
  return frame.id === "a";
});
seen.final = final.payload.result.payloads;
if (kind === "ws") {
  const pong = new Promise((resolve) => line.socket.once("pong", resolve));
  line.socket.ping("are you there?");
  seen.pong = String(await pong);
}
line.socket.send(JSON.stringify({ type: "req", id: "large", method: "health" }).padEnd(MAX));
seen.large = (await line.until((frame) => frame.id === "large")).ok;
for (const end = Date.now() + Number(milliseconds); Date.now() < end; seen.ticks += 1) await line.event("tick");
line.socket.close(1000);
seen.closed = await line.closed;

const wrong = new Line();
await wrong.event("connect.challenge");
seen.refused = (await wrong.connect("wrong")).error.message;
seen.wrong = await wrong.closed;

const large = new Line();
await large.event("connect.challenge");
await large.connect(token);
large.socket.send(" ".repeat(MAX + 1));
seen.tooLarge = await large.closed;

console.log(JSON.stringify(seen));
