// Shares of attention as in detr_nb.attention: a softmax over the keys, in one head or in several.

/** Positive shares that sum to 1; the largest score is taken off first, so that nothing overflows. */
export function softmax(scores) {
  const largest = Math.max(...scores);
  const powers = scores.map((score) => Math.exp(score - largest));
  const sum = powers.reduce((total, power) => total + power, 0);
  return powers.map((power) => power / sum);
}

/** The shares of all keys in the answer to one query: one list for each head.
 *
 * Heads cut the width of query and keys into equal parts. `strength` multiplies the scores, which are already divided by
 * the square root of the head's width.
 */
export function shares(query, keys, heads, strength) {
  const width = query.length / heads;
  return Array.from({ length: heads }, (_, head) => {
    const own = query.slice(head * width, (head + 1) * width);
    const score = (key) => own.reduce((sum, x, j) => sum + x * key[head * width + j], 0);
    return softmax(keys.map((key) => (strength * score(key)) / Math.sqrt(width)));
  });
}

/** How many keys share the answer: the exponential of the entropy, between 1 and the number of keys. */
export function spreadOf(weights) {
  return Math.exp(-weights.reduce((sum, w) => sum + (w > 0 ? w * Math.log(w) : 0), 0));
}

/** Recorded shares from a text of bytes: each byte is the root of a share, of the largest in its row. */
export function unpack(text, width) {
  const bytes = Uint8Array.from(atob(text), (letter) => letter.charCodeAt(0));
  return Array.from({ length: bytes.length / width }, (_, row) => {
    const parts = Array.from(bytes.subarray(row * width, (row + 1) * width), (byte) => (byte / 255) ** 2);
    const sum = parts.reduce((total, part) => total + part, 0);
    return parts.map((part) => part / sum);
  });
}
