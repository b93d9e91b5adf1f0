// A box that can be dragged by its inside, resized by its corners, and moved and resized by the arrow keys.

import { corners, fromCorners, keepInside } from "./geometry.js";
import { arrowKeys, dragging, put, svg, two } from "./stage.js";

const STEP = 0.01; // of an arrow key, as a share of the image

/** Say a box in words. */
export function boxInWords([cx, cy, w, h]) {
  return `centre ${two(cx)} from the left and ${two(cy)} from the top, ${two(w)} wide, ${two(h)} high`;
}

/** The group of a movable box on a drawing of `size` units a side, with a short `label` in a corner of its own kind.
 *
 * `changed(box)` is called for every move and `settled()` at its end. Returns the element and `set(box)`.
 */
export function movableBox({ drawing, size, kind, name, label = name, changed, settled = () => null, focused = () => null }) {
  let box = [0, 0, 0, 0];
  const fillRect = svg("rect", { class: "xp-inside" });
  const low = kind === "target"; // its label is at the lower right, so that two labels seldom meet
  const text = svg("text", { class: "xp-name", "text-anchor": low ? "end" : "start" }, label);
  const grips = [0, 1, 2, 3].map((corner) => {
    const grip = svg("g", { class: corner % 3 ? "xp-grip xp-rising" : "xp-grip xp-falling" });
    grip.append(svg("circle", { class: "xp-reach", r: 14 }), svg("circle", { class: "xp-dot", r: 5 }));
    return grip;
  });
  const element = svg(
    "g",
    { class: `xp-box xp-${kind}`, tabindex: 0, role: "application", "aria-roledescription": "movable box" },
    fillRect,
    text,
    ...grips,
  );
  const move = (next) => changed(keepInside(next));
  const began = () => {
    element.focus({ preventScroll: true });
    return [...box];
  };
  dragging(drawing, fillRect, {
    began,
    moved: (x, y, { at, what }) =>
      move([what[0] + (x - at[0]) / size, what[1] + (y - at[1]) / size, what[2], what[3]]),
    ended: settled,
  });
  grips.forEach((grip, corner) => {
    const [sideX, sideY] = [corner % 2 ? 2 : 0, corner < 2 ? 1 : 3];
    dragging(drawing, grip, {
      began,
      moved: (x, y, { at, what }) => {
        const edges = corners(what);
        const within = (value) => Math.min(1, Math.max(0, value));
        edges[sideX] = within(edges[sideX] + (x - at[0]) / size);
        edges[sideY] = within(edges[sideY] + (y - at[1]) / size);
        const least = 0.03; // the corner that is not dragged stays
        edges[sideX] = sideX ? Math.max(edges[sideX], edges[0] + least) : Math.min(edges[0], edges[2] - least);
        edges[sideY] = sideY === 3 ? Math.max(edges[3], edges[1] + least) : Math.min(edges[1], edges[3] - least);
        move(fromCorners(edges));
      },
      ended: settled,
    });
  });
  arrowKeys(element, (dx, dy, shift) => {
    const next = [...box];
    next[shift ? 2 : 0] += STEP * dx;
    next[shift ? 3 : 1] += STEP * dy;
    move(next);
    settled();
  });
  element.addEventListener("focus", () => focused());
  const set = (next) => {
    box = [...next];
    const [x0, y0, x1, y1] = corners(next).map((edge) => edge * size);
    put(fillRect, { x: x0, y: y0, width: x1 - x0, height: y1 - y0 });
    put(text, { x: low ? x1 - 7 : x0 + 7, y: low ? y1 - 8 : y0 + 19 });
    grips.forEach((grip, corner) =>
      put(grip, { transform: `translate(${corner % 2 ? x1 : x0} ${corner < 2 ? y0 : y1})` }),
    );
    put(element, { "aria-label": `${name}: ${boxInWords(next)}` });
  };
  return { element, set };
}
