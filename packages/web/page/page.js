/** What is typed goes to a worker, which holds the model; what it finds is shown. */

const $ = (id) => document.getElementById(id);
const megabytes = (bytes) => `${(bytes / 1e6).toFixed(2)} MB`;
const figures = new Map();

let worker;
let asked = 0;
let busy = false;

function show(name, value) {
  figures.set(name, value);
  const rows = [...figures].map(([term, text]) => {
    const row = document.createElement("div");
    row.append(
      Object.assign(document.createElement("dt"), { textContent: term }),
      Object.assign(document.createElement("dd"), { textContent: text }),
    );
    return row;
  });
  $("figures").replaceChildren(...rows);
}

/** One question at a time: while one is answered, only the newest waits. */
function ask() {
  asked++;
  if (worker && !busy) send();
}

function send() {
  busy = true;
  worker.postMessage({ id: asked, text: $("query").value });
}

function showResults({ id, text, found, milliseconds }) {
  const items = found.map(({ sentence, index, score }) => {
    const item = document.createElement("li");
    item.dataset.index = index;
    const number = Object.assign(document.createElement("span"), { textContent: score.toFixed(3) });
    item.append(sentence, number);
    return item;
  });
  $("results").replaceChildren(...items);
  $("results").dataset.query = text;
  $("status").textContent = `Found in ${milliseconds.toFixed(0)} ms`;
  if (!figures.has("First result after")) {
    show("First result after", `${(performance.now() / 1000).toFixed(1)} s`);
    document.body.dataset.first = performance.now();
  }
  busy = false;
  if (id !== asked) send();
}

const RECEIVED = {
  status: ({ text }) => {
    $("status").textContent = text;
  },
  facts: ({ model, original, transfer, count }) => {
    $("model").textContent = `one file of ${megabytes(model)}`;
    $("original").textContent = megabytes(original);
    $("count").textContent = count.toLocaleString("en");
    show("Model", `${megabytes(model)}, not ${megabytes(original)}`);
    show("With runtime and sentences", megabytes(transfer));
  },
  decoded: ({ weights, seconds }) => {
    const rate = (weights / seconds / 1e6).toFixed(0);
    show("Decoded in", `${seconds.toFixed(2)} s (${rate} M weights/s)`);
    Object.assign(document.body.dataset, { weights, seconds });
  },
  ready: () => {
    busy = false;
    send();
  },
  results: showResults,
  failed: ({ text }) => {
    $("status").textContent = `This did not work: ${text}`;
    document.body.dataset.failed = text;
  },
};

/** Wait for the service worker, so that everything is fetched once and kept. */
async function controlled() {
  if (!("serviceWorker" in navigator)) return;
  const changed = new Promise((resolve) => {
    navigator.serviceWorker.addEventListener("controllerchange", resolve, { once: true });
  });
  await navigator.serviceWorker.register("service-worker.js", { type: "module" });
  if (!navigator.serviceWorker.controller) await changed;
}

$("query").addEventListener("input", ask);
controlled()
  .catch((error) => console.warn("no service worker: the page needs a network", error))
  .then(() => {
    busy = true;
    worker = new Worker("worker.js", { type: "module" });
    worker.onmessage = ({ data }) => RECEIVED[data.kind](data);
    worker.onerror = ({ message }) => RECEIVED.failed({ text: message ?? "the worker did not load" });
  });
