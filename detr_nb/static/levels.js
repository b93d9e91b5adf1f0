// The levels of a picture's cells on a drawing: each has a tone, a mark and a line of its own.

import { choice, html, svg } from "./stage.js";

const STYLES = [
  { tone: "#4aa8ff", dashes: "none", mark: (r) => `M${-r} 0a${r} ${r} 0 1 0 ${2 * r} 0a${r} ${r} 0 1 0 ${-2 * r} 0z` },
  { tone: "#ff8a3d", dashes: "7 3", mark: (r) => `M${-r} ${-r}h${2 * r}v${2 * r}h${-2 * r}z` },
  { tone: "#2fd39a", dashes: "2 3", mark: (r) => `M0 ${-1.2 * r}L${1.2 * r} ${r}H${-1.2 * r}z` },
  { tone: "#ff8fd0", dashes: "9 3 2 3", mark: (r) => `M0 ${-1.4 * r}L${1.4 * r} 0L0 ${1.4 * r}L${-1.4 * r} 0z` },
];

/** Tone, dashes of lines and mark (a path by its radius) of a level. */
export function styleOf(level) {
  return STYLES[level % STYLES.length];
}

/** A key of the levels, with marks or with lines. */
export function levelKey(shapes, lines) {
  const rows = shapes.map(([rows, columns], level) => {
    const { tone, dashes, mark } = styleOf(level);
    const sign = lines
      ? svg("path", { d: "M0 8H28", stroke: tone, "stroke-width": 4, "stroke-dasharray": dashes })
      : svg("path", { class: "xp-sample", d: mark(5), fill: tone, transform: "translate(14 8)" });
    const drawn = svg("svg", { class: "xp-sign", viewBox: "0 0 28 16", "aria-hidden": "true" }, sign);
    return html("span", {}, drawn, `level ${level + 1}: ${rows} by ${columns} cells`);
  });
  return html("p", { class: "xp-key" }, ...rows);
}

/** Buttons for one level or all (-1). */
export function levelChoice(count, value, changed) {
  return choice({
    label: "Level",
    options: [["-1", "All"], ...Array.from({ length: count }, (_, level) => [String(level), String(level + 1)])],
    value: String(value),
    changed: (key) => changed(Number(key)),
  });
}
