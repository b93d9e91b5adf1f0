// The furniture of an explorable: elements, controls, dragging by pointer and by keyboard, and words for screen readers.

const SVG = "http://www.w3.org/2000/svg";

function fill(node, attributes, children) {
  for (const [name, value] of Object.entries(attributes)) {
    if (name.startsWith("on")) node.addEventListener(name.slice(2), value);
    else if (value !== false && value !== undefined) node.setAttribute(name, value === true ? "" : value);
  }
  node.append(...children.filter((child) => child !== null));
  return node;
}

/** An HTML element; attributes that begin with "on" are listeners. */
export function html(name, attributes = {}, ...children) {
  return fill(document.createElement(name), attributes, children);
}

/** An SVG element. */
export function svg(name, attributes = {}, ...children) {
  return fill(document.createElementNS(SVG, name), attributes, children);
}

/** Set attributes of an element that exists. */
export function put(node, attributes) {
  for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
  return node;
}

/** Buttons in one row, as a group with a name. */
export function rowOf(name, ...buttons) {
  return html("div", { class: "xp-row", role: "group", "aria-label": name }, ...buttons);
}

/** A square drawing of the image with a light grid; `size` units a side. */
export function imageDrawing(size, name, ...definitions) {
  const drawing = svg(
    "svg",
    { viewBox: `-8 -8 ${size + 16} ${size + 16}`, class: "xp-drawing", role: "group", "aria-label": name },
    svg("defs", {}, ...definitions),
    svg("rect", { class: "xp-paper", width: size, height: size, rx: 3 }),
  );
  for (let line = 1; line < 10; line += 1) {
    const at = (line * size) / 10;
    drawing.append(svg("path", { class: "xp-grid", d: `M${at} 0V${size}M0 ${at}H${size}` }));
  }
  return drawing;
}

/** Draw again whenever one of these traits changes; returns what undoes it. */
export function follow(model, names, draw) {
  names.forEach((name) => model.on(`change:${name}`, draw));
  draw();
  return () => names.forEach((name) => model.off(`change:${name}`, draw));
}

/** A name that nothing else on the page has; several explorables do not know each other, so it is drawn at random. */
export function fresh(prefix) {
  return `xp-${prefix}-${Math.random().toString(36).slice(2, 12)}`;
}

/** The frame around everything: a title, the stage, a panel of controls, and one sentence that says what is seen.
 *
 * Returns `stage`, `panel`, and `say`, which a screen reader speaks when the numbers have come to rest.
 */
export function frame(el, { title, help }) {
  const name = fresh("title");
  const stage = html("div", { class: "xp-stage" });
  const panel = html("div", { class: "xp-panel" });
  const words = html("p", { class: "xp-words" });
  const spoken = html("p", { class: "xp-spoken", role: "status" });
  let waiting = null;
  let first = true;
  const say = (text) => {
    words.textContent = text;
    clearTimeout(waiting);
    if (!first) waiting = setTimeout(() => (spoken.textContent = text), 500);
    first = false;
  };
  el.append(
    html(
      "section",
      { class: "xp", "aria-labelledby": name },
      html("p", { class: "xp-title", id: name }, title),
      html("div", { class: "xp-body" }, html("div", { class: "xp-left" }, stage, words), panel),
      html("p", { class: "xp-help" }, help),
      spoken,
    ),
  );
  return { stage, panel, say };
}

/** A button. */
export function button(text, onclick, attributes = {}) {
  return html("button", { type: "button", class: "xp-button", onclick, ...attributes }, text);
}

/** A switch: a checkbox with its words. Returns the element; `changed` gets true or false. */
export function toggle(text, value, changed) {
  const input = html("input", { type: "checkbox", onchange: () => changed(input.checked) });
  input.checked = value;
  return html("label", { class: "xp-toggle" }, input, html("span", {}, text));
}

/** A slider with its name and its value in words. Returns the element and `set`. */
export function slider({ label, min, max, step, value, format = String, changed }) {
  const output = html("output", {});
  const id = fresh("slider");
  const input = html("input", { type: "range", id, min, max, step, oninput: () => set(Number(input.value), true) });
  const set = (number, tell = false) => {
    input.value = number;
    output.textContent = format(number);
    input.setAttribute("aria-valuetext", format(number));
    if (tell) changed(number);
  };
  set(value);
  return { element: html("div", { class: "xp-slider" }, html("label", { for: id }, label), output, input), set };
}

/** One of several: radio buttons that look like one bar; `options` are pairs of key and text, or an object of them. */
export function choice({ label, options, value, changed }) {
  const group = fresh("choice");
  const pairs = Array.isArray(options) ? options : Object.entries(options);
  const inputs = pairs.map(([key, text]) => {
    const input = html("input", { type: "radio", name: group, value: key, onchange: () => changed(key) });
    input.checked = key === value;
    return { input, element: html("label", {}, input, html("span", {}, text)) };
  });
  const bar = html("div", { class: "xp-bar" }, ...inputs.map((one) => one.element));
  const set = (key) => inputs.forEach(({ input }) => (input.checked = input.value === key));
  return { element: html("fieldset", { class: "xp-choice" }, html("legend", {}, label), bar), set };
}

/** A table of numbers with named rows and columns; `set` replaces the cells. */
export function table({ caption, head, rows }) {
  const cells = rows.map(() => head.slice(1).map(() => html("td", {})));
  const lines = rows.map((name, i) => html("tr", {}, html("th", { scope: "row" }, name), ...cells[i]));
  const names = head.map((name) => html("th", { scope: "col" }, name));
  const element = html(
    "table",
    { class: "xp-table" },
    html("caption", {}, caption),
    html("thead", {}, html("tr", {}, ...names)),
    html("tbody", {}, ...lines),
  );
  const set = (values) => values.forEach((row, i) => row.forEach((text, j) => (cells[i][j].textContent = text)));
  return { element, set, cells, lines };
}

/** Call `moved(x, y, start)` while `node` is dragged, in the units of the drawing; `start` is where the drag began. */
export function dragging(drawing, node, { began = () => null, moved, ended = () => null }) {
  let start = null;
  const place = (event) => {
    const point = new DOMPoint(event.clientX, event.clientY).matrixTransform(drawing.getScreenCTM().inverse());
    return [point.x, point.y];
  };
  // A finger that drags must not scroll; some browsers do not heed `touch-action` inside a drawing.
  node.addEventListener("touchstart", (event) => event.preventDefault(), { passive: false });
  node.addEventListener("pointerdown", (event) => {
    if (event.button > 0) return;
    event.preventDefault();
    event.stopPropagation();
    node.setPointerCapture(event.pointerId);
    start = { at: place(event), what: began() };
  });
  node.addEventListener("pointermove", (event) => {
    if (start) moved(...place(event), start);
  });
  const stop = () => {
    if (start) ended();
    start = null;
  };
  node.addEventListener("pointerup", stop);
  node.addEventListener("pointercancel", stop);
}

const ARROWS = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] };

/** Call `pressed(dx, dy, shift)` for the arrow keys, with steps of 1. */
export function arrowKeys(node, pressed) {
  node.addEventListener("keydown", (event) => {
    if (!(event.key in ARROWS) || event.altKey || event.ctrlKey || event.metaKey) return;
    event.preventDefault();
    event.stopPropagation();
    pressed(...ARROWS[event.key], event.shiftKey);
  });
}

/** A number with two decimals and a real minus sign. */
export function two(x) {
  const text = Math.abs(x) < 0.005 ? "0.00" : x.toFixed(2);
  return text.replace("-", "\u2212");
}
