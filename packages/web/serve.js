/** A static server: `node serve.js FOLDER [PORT]`. It sends the `.br` beside a file where there is one. */

import { createReadStream } from "node:fs";
import { stat } from "node:fs/promises";
import { createServer } from "node:http";
import { extname, join, normalize } from "node:path";
import { pathToFileURL } from "node:url";

const TYPES = {
  ".html": "text/html; charset=utf-8", ".js": "text/javascript", ".mjs": "text/javascript",
  ".css": "text/css", ".json": "application/json", ".txt": "text/plain; charset=utf-8",
  ".wasm": "application/wasm",
};

/** Starts a server; `sent` has the bytes of bodies by path. */
export async function serve(folder, port = 0) {
  const sent = new Map();
  const server = createServer(async (request, response) => {
    const path = normalize(decodeURIComponent(new URL(request.url, "http://x").pathname));
    const file = join(folder, path.endsWith("/") ? `${path}index.html` : path);
    try {
      const takes = /\bbr\b/.test(request.headers["accept-encoding"] ?? "");
      const packed = takes ? await stat(`${file}.br`).catch(() => null) : null;
      const { size } = packed ?? (await stat(file));
      const headers = {
        "content-type": TYPES[extname(file)] ?? "application/octet-stream",
        "content-length": size,
        "cache-control": "no-cache",
        vary: "accept-encoding",
      };
      if (packed) headers["content-encoding"] = "br";
      response.writeHead(200, headers);
      sent.set(path, (sent.get(path) ?? 0) + size);
      createReadStream(packed ? `${file}.br` : file).pipe(response);
    } catch {
      response.writeHead(404).end();
    }
  });
  await new Promise((resolve) => server.listen(port, "127.0.0.1", resolve));
  return { url: `http://127.0.0.1:${server.address().port}/`, sent, server };
}

if (import.meta.url === pathToFileURL(process.argv[1]).href) {
  const { url } = await serve(process.argv[2], Number(process.argv[3] ?? 8000));
  console.log(url);
}
