#!/usr/bin/env node
// The JavaScript half of refusals.py: reads each stream that is asked for with the real SDKs, and prints a line of JSON for
// each: the text that came, and the error that was thrown, or null.
import { createRequire } from "node:module";
const req = createRequire(process.env.CLIENTS_DIR + "/");
const OpenAI = req("openai"), Anthropic = req("@anthropic-ai/sdk");
const messages = [{ role: "user", content: "Hi" }];
for (const [why, url, feature, sdk, endpoint, more] of JSON.parse(process.argv[2])) {
  let text = "", error = null;
  try {
    if (sdk === "anthropic") {
      const c = new (Anthropic.default ?? Anthropic)({ baseURL: url, apiKey: "none", maxRetries: 0 });
      for await (const e of await c.messages.create({ model: "m", messages, stream: true, ...more })) text += e.delta?.text ?? "";
    } else {
      const c = new (OpenAI.default ?? OpenAI)({ baseURL: url + "/v1", apiKey: "none", maxRetries: 0 });
      if (endpoint === "completion") {
        for await (const e of await c.completions.create({ model: "m", prompt: "Hi", stream: true, ...more })) text += e.choices[0].text;
      } else {
        for await (const e of await c.chat.completions.create({ model: "m", messages, stream: true, ...more })) {
          const delta = e.choices[0].delta;
          text += delta.content || delta.reasoning_content || (delta.tool_calls ?? []).map((t) => t.function.arguments).join("");
        }
      }
    }
  } catch (e) { error = `${e?.constructor?.name}: ${e?.message}`; }
  console.log(JSON.stringify({ why, feature, text, error }));
}
