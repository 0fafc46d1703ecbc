/** Reads `.dither` files, version 1. Written from docs/FORMAT.md alone, whose words it uses. */

export { Archive } from "./archive.js";
export { DecodeError, LimitError } from "./errors.js";
