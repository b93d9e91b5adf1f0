// A dark veil over a picture, thin where attention is strong.

import { put, svg } from "./stage.js";

const DARKEST = 0.78; // where nothing is looked at

/** Cells of a veil over a picture of `size` units a side, and `set(weights)`. */
export function veilOver(size, rows, columns) {
  const [wide, tall] = [size / columns, size / rows];
  const cells = Array.from({ length: rows * columns }, (_, cell) =>
    svg("rect", {
      class: "xp-veil", x: (cell % columns) * wide, y: Math.floor(cell / columns) * tall, width: wide, height: tall,
    }),
  );
  const set = (weights) => {
    const largest = Math.max(...weights);
    cells.forEach((cell, place) =>
      put(cell, { "fill-opacity": (DARKEST * (1 - Math.sqrt(weights[place] / largest))).toFixed(3) }),
    );
  };
  return { cells, set };
}
