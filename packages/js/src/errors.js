/** The file is damaged, or is none of this version. */
export class DecodeError extends Error {
  name = "DecodeError";
}

/** Reading would take more memory or time than `maxBytes` allows. */
export class LimitError extends DecodeError {
  name = "LimitError";
}

/** Refuse the file unless a condition holds. */
export function must(condition, what) {
  if (!condition) throw new DecodeError(what);
}
