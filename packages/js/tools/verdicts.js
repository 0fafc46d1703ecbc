/**
 * `node verdicts.js FILES MAX_BYTES`: FILES holds files one behind the other, each after its length
 * (u32). For each one line of JSON is printed: "refused", "limit", or digests of its tensors.
 */

import { readFileSync } from "node:fs";
import { Archive, DecodeError, LimitError } from "../src/index.js";
import { digest, withOneNaN } from "./digests.js";

function verdict(data, maxBytes) {
  try {
    const archive = new Archive(data, { maxBytes });
    const names = archive.names();
    return Object.fromEntries(names.map((name) => [name, digest(withOneNaN(archive.read(name)))]));
  } catch (error) {
    if (error instanceof LimitError) return "limit";
    if (error instanceof DecodeError && error.message) return "refused";
    throw error;
  }
}

const files = new Uint8Array(readFileSync(process.argv[2]));
const view = new DataView(files.buffer);
const lines = [];
for (let at = 0; at < files.length; ) {
  const length = view.getUint32(at, true);
  const data = files.subarray(at + 4, at + 4 + length);
  lines.push(JSON.stringify(verdict(data, Number(process.argv[3]))));
  at += 4 + length;
}
process.stdout.write(lines.join("\n") + "\n");
