/**
 * `node test.js FOLDER SHOTS`: drives the built page in headless Chromium. What it finds must be what
 * Python found, before and after the network goes; `CHROMIUM` names the browser.
 */

import assert from "node:assert/strict";
import { mkdirSync, readFileSync } from "node:fs";
import { join } from "node:path";
import { chromium } from "playwright-core";
import { serve } from "./serve.js";

const [folder, shots] = process.argv.slice(2);
const WIDTHS = [1280, 390];
const PATIENCE = 120_000;
const TIMES = 5;
const expected = JSON.parse(readFileSync(join(folder, "expected.json"), "utf8"));
const facts = JSON.parse(readFileSync(join(folder, "facts.json"), "utf8"));

mkdirSync(shots, { recursive: true });
const { url, sent, server } = await serve(folder);
const browser = await chromium.launch({
  executablePath: process.env.CHROMIUM ?? "/usr/bin/chromium",
  args: ["--no-sandbox"],
});
const context = await browser.newContext({ viewport: { width: WIDTHS[0], height: 900 } });
const page = await context.newPage();
const complaints = [];
page.on("console", (message) => {
  if (message.type() === "error") complaints.push(message.text());
});
page.on("pageerror", (error) => complaints.push(`${error}`));

/** Processor time, which a busy machine hardly changes, of all that show pages. */
async function secondsOfRenderers() {
  const session = await browser.newBrowserCDPSession();
  const { processInfo } = await session.send("SystemInfo.getProcessInfo");
  await session.detach();
  const renderers = processInfo.filter(({ type }) => type === "renderer");
  return renderers.reduce((sum, { cpuTime }) => sum + cpuTime, 0);
}

/** The page's ten for a text that is typed. */
async function search(text) {
  await page.fill("#query", text);
  await page.waitForFunction(
    (query) => document.getElementById("results").dataset.query === query || document.body.dataset.failed,
    text,
    { timeout: PATIENCE },
  );
  assert.equal(await page.evaluate(() => document.body.dataset.failed), undefined);
  return page.$$eval("#results li", (items) => items.map((item) => Number(item.dataset.index)));
}

async function checkAll(when) {
  let equal = 0;
  for (const [query, best] of Object.entries(expected.best)) {
    assert.deepEqual(await search(query), best, `${when}: ${query}`);
    equal++;
  }
  console.log(`${when}: ${equal} of ${equal} queries have Python's ten, in its order`);
}

async function waitForFirst() {
  await page.waitForFunction(() => document.body.dataset.first || document.body.dataset.failed, null, {
    timeout: PATIENCE,
  });
  const { first, failed, weights, seconds } = await page.evaluate(() => ({ ...document.body.dataset }));
  assert.equal(failed, undefined, failed);
  const rate = (weights / seconds / 1e6).toFixed(1);
  return `${(first / 1000).toFixed(2)} s to the first result; ${weights} weights decoded in ` +
    `${Number(seconds).toFixed(2)} s, ${rate} M weights/s`;
}

try {
  await page.goto(url);
  console.log(`first visit: ${await waitForFirst()}`);
  const total = [...sent.values()].reduce((a, b) => a + b, 0);
  console.log(`${total} bytes sent, ${facts.model} of them the model, which had ${facts.original}`);
  for (const [path, size] of [...sent].sort((a, b) => b[1] - a[1]).slice(0, 6)) {
    console.log(`  ${size} ${path}`);
  }
  assert.equal(sent.get("/model.dither"), facts.model, "the model is fetched once");
  assert.ok(total < 1.02 * facts.transfer, `the page states ${facts.transfer} bytes`);

  const wrong = await page.evaluate(async (tokens) => {
    const { Tokenizer } = await import("./tokenizer.js");
    const tokenizer = new Tokenizer(await (await fetch("vocab.txt")).text());
    return Object.keys(tokens).filter((text) => `${tokenizer.encode(text)}` !== `${tokens[text]}`);
  }, expected.tokens);
  assert.deepEqual(wrong, [], "texts are cut into other tokens than by Python");
  console.log(`${Object.keys(expected.tokens).length} texts are cut into the same tokens`);

  const before = await secondsOfRenderers();
  const decoded = await page.evaluate(async (times) => {
    const { Archive } = await import("./dither/index.js");
    const file = await (await fetch("model.dither")).arrayBuffer();
    let count = 0;
    for (let time = 0; time < times; time++) {
      const archive = new Archive(file);
      for (const name of archive.tensors.keys()) count += archive.read(name).data.length;
    }
    return count;
  }, TIMES);
  const used = (await secondsOfRenderers()) - before;
  console.log(`decoded ${TIMES} times: ${(decoded / used / 1e6).toFixed(1)} M weights/s of processor time`);

  await checkAll("with a network");
  await search(Object.keys(expected.best)[0]);
  for (const width of WIDTHS) {
    await page.setViewportSize({ width, height: 900 });
    const wide = await page.evaluate(() => document.documentElement.scrollWidth);
    assert.ok(wide <= width, `at ${width} px the page is ${wide} px wide`);
    await page.screenshot({ path: join(shots, `page-${width}.png`), fullPage: true });
  }

  server.closeAllConnections();
  await new Promise((resolve) => server.close(resolve));
  await context.setOffline(true);
  await page.reload();
  console.log(`second visit, without a network: ${await waitForFirst()}`);
  await checkAll("without a network");
  assert.deepEqual(complaints, []);
} finally {
  await browser.close();
  server.close();
}
