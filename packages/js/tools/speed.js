/** `node speed.js FILE [TIMES]`: how long it takes to open a file and decode all of its tensors. */

import { readFileSync } from "node:fs";
import { Archive } from "../src/index.js";

const file = new Uint8Array(readFileSync(process.argv[2]));
for (let time = 0; time < Number(process.argv[3] ?? 3); time++) {
  const begin = performance.now();
  const before = process.cpuUsage();
  const archive = new Archive(file);
  let count = 0;
  for (const name of archive.tensors.keys()) count += archive.read(name).data.length;
  const seconds = (performance.now() - begin) / 1000;
  const { user, system } = process.cpuUsage(before);
  const ofCore = (user + system) / 1e6; // what a busy machine hardly changes
  const rates = [seconds, ofCore].map((s) => `${s.toFixed(3)} s (${(count / s / 1e6).toFixed(1)} M/s)`);
  console.log(`${file.length} bytes, ${count} weights: ${rates[0]}, of processor ${rates[1]}`);
}
