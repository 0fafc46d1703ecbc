import assert from "node:assert/strict";
import { readFileSync } from "node:fs";
import test from "node:test";
import { Archive } from "../src/index.js";
import { digest } from "../tools/digests.js";

const FOLDER = new URL("../../../fixtures/", import.meta.url);
const golden = JSON.parse(readFileSync(new URL("golden.json", FOLDER)));

for (const [file, digests] of Object.entries(golden)) {
  test(`golden file ${file}`, () => {
    const archive = new Archive(readFileSync(new URL(`${file}.dither`, FOLDER)));
    assert.deepEqual(archive.names().sort(), Object.keys(digests).sort());
    for (const [name, expected] of Object.entries(digests)) {
      assert.equal(digest(archive.read(name)), expected, name);
    }
  });
}
