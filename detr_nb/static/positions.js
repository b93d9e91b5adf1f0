// Addresses of cells as in detr_nb.positions: sines and cosines of falling frequency, first for y, then for x.

/** Channels 2j and 2j + 1 hold the sine and the cosine of position / temperature^(2j / width). */
export function sineEmbedding(position, width, temperature) {
  return Array.from({ length: width }, (_, channel) => {
    const angle = position * temperature ** -((channel - (channel % 2)) / width);
    return channel % 2 ? Math.cos(angle) : Math.sin(angle);
  });
}

/** The angle of the `place`-th of `count` rows or columns, counted from 0: the last one makes a full turn. */
export function angleOf(place, count) {
  return (2 * Math.PI * (place + 1)) / (count + 1e-6);
}

/** The address of every cell of a grid without padding, row by row: `d` numbers each. */
export function addresses(rows, columns, d, temperature) {
  const half = (count) =>
    Array.from({ length: count }, (_, place) => sineEmbedding(angleOf(place, count), d / 2, temperature));
  const [down, right] = [half(rows), half(columns)];
  return down.flatMap((y) => right.map((x) => [...y, ...x]));
}

/** The dot product of one address with all, as a share of its dot product with itself. */
export function similarities(table, cell) {
  const own = table[cell];
  const dot = (other) => own.reduce((sum, x, j) => sum + x * other[j], 0);
  const length = dot(own);
  return table.map((other) => dot(other) / length);
}
