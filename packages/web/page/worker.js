/** Fetches the model, decodes it, and answers questions. */

import { Archive } from "./dither/index.js";
import * as ort from "./ort/ort.wasm.bundle.min.mjs";
import { Tokenizer } from "./tokenizer.js";

const WIDTH = 384;

ort.env.wasm.numThreads = 1; // more need headers that many static servers do not send
ort.env.wasm.wasmPaths = { wasm: new URL("ort/ort-wasm-simd-threaded.wasm", self.location).href };

const post = (kind, values = {}) => self.postMessage({ kind, ...values });

async function get(name) {
  const response = await fetch(name);
  if (!response.ok) throw new Error(`${name}: ${response.status} ${response.statusText}`);
  return response;
}

const bytes = async (name) => new Uint8Array(await (await get(name)).arrayBuffer());
const json = async (name) => (await get(name)).json();
const text = async (name) => (await get(name)).text();

/** All weights, one behind the other, where the graph looks for them. */
function decode(file, layout) {
  const begin = performance.now();
  const archive = new Archive(file);
  const count = Math.max(...Object.values(layout).map(([, end]) => end));
  const weights = new Float32Array(count);
  for (const [name, [start]] of Object.entries(layout)) {
    weights.set(archive.readFloat32(name), start);
  }
  post("decoded", { weights: count, seconds: (performance.now() - begin) / 1000 });
  return new Uint8Array(weights.buffer);
}

async function load() {
  const facts = json("facts.json");
  const rest = Promise.all([
    bytes("graph.onnx"), json("layout.json"), text("vocab.txt"), json("sentences.json"),
    bytes("vectors.bin"),
  ]);
  const { model, original, transfer } = await facts;
  post("status", { text: "Loading the model" });
  const file = await bytes("model.dither");
  const [graph, layout, vocabulary, sentences, vectors] = await rest;
  post("facts", { model, original, transfer, count: sentences.length });
  post("status", { text: "Decoding the model" });
  const data = decode(file, layout);
  post("status", { text: "Starting the model" });
  const session = await ort.InferenceSession.create(graph, {
    externalData: [{ path: "weights.bin", data }],
  });
  return { session, tokenizer: new Tokenizer(vocabulary), sentences, rows: new Int8Array(vectors.buffer) };
}

/** Cosines of one embedding with all rows, best first. */
function best(embedding, rows, count) {
  const scored = [];
  for (let index = 0; index < count; index++) {
    let sum = 0;
    let squares = 0;
    for (let j = 0, at = index * WIDTH; j < WIDTH; j++, at++) {
      sum += embedding[j] * rows[at];
      squares += rows[at] * rows[at];
    }
    scored.push({ index, score: sum / Math.sqrt(squares) });
  }
  return scored.sort((a, b) => b.score - a.score || a.index - b.index).slice(0, 10);
}

async function search({ id, text: query }, { session, tokenizer, sentences, rows }) {
  const begin = performance.now();
  const ids = BigInt64Array.from(tokenizer.encode(query), BigInt);
  const shape = [1, ids.length];
  const { embedding } = await session.run({
    ids: new ort.Tensor("int64", ids, shape),
    mask: new ort.Tensor("int64", new BigInt64Array(ids.length).fill(1n), shape),
  });
  const found = best(embedding.data, rows, sentences.length);
  for (const item of found) item.sentence = sentences[item.index];
  post("results", { id, text: query, found, milliseconds: performance.now() - begin });
}

const fail = (error) => post("failed", { text: `${error.message ?? error}` });

load().then((loaded) => {
  self.onmessage = ({ data }) => search(data, loaded).catch(fail);
  post("ready");
}, fail);
