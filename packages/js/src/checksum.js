const TABLE = Uint32Array.from({ length: 256 }, (_, i) => {
  for (let k = 0; k < 8; k++) i = i & 1 ? (i >>> 1) ^ 0xedb88320 : i >>> 1;
  return i;
});

/** CRC-32 of zlib and PNG, of one piece after another. */
export function crc32(...pieces) {
  let crc = 0xffffffff;
  for (const piece of pieces) {
    for (let i = 0; i < piece.length; i++) crc = TABLE[(crc ^ piece[i]) & 255] ^ (crc >>> 8);
  }
  return ~crc >>> 0;
}

/** The checksum at the end of a zlib stream. */
export function adler32(data) {
  let a = 1;
  let b = 0;
  for (let i = 0; i < data.length; ) {
    const stop = Math.min(i + 3800, data.length);
    for (; i < stop; i++) b += a += data[i];
    a %= 65521;
    b %= 65521;
  }
  return b * 65536 + a;
}
