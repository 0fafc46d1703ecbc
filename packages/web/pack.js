/**
 * `node pack.js FOLDER`: Brotli beside every file that gets smaller by it, and in `facts.json` the
 * bytes of all that the page loads.
 */

import { readdirSync, readFileSync, statSync, writeFileSync } from "node:fs";
import { join } from "node:path";
import { brotliCompressSync, constants } from "node:zlib";

const folder = process.argv[2];
const params = { [constants.BROTLI_PARAM_QUALITY]: 11, [constants.BROTLI_PARAM_LGWIN]: 22 };

let transfer = 0;
for (const name of readdirSync(folder, { recursive: true })) {
  if (/(\.br|\.d\.ts|expected\.json)$/.test(name) || statSync(join(folder, name)).isDirectory()) continue;
  transfer += statSync(join(folder, name)).size;
  if (!/\.(html|js|mjs|css|json|txt|wasm|onnx|bin)$/.test(name)) continue;
  const data = readFileSync(join(folder, name));
  const packed = brotliCompressSync(data, { params });
  if (packed.length > 0.98 * data.length) continue;
  writeFileSync(join(folder, `${name}.br`), packed);
  transfer += packed.length - data.length;
}
const facts = join(folder, "facts.json");
writeFileSync(facts, JSON.stringify({ ...JSON.parse(readFileSync(facts, "utf8")), transfer }));
console.log(`${folder}: ${transfer} bytes to load`);
