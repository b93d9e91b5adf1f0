// Tells RequireJS where the vendored widget code lies, whatever folder the page is in, over http or from disk.
(function () {
  const here = document.currentScript.src.replace(/[^/]*$/, "");
  const paths = { anywidget: here + "anywidget/index", "@jupyter-widgets/html-manager/dist": here + "html-manager" };
  // embed-amd.js holds these itself; their addresses only tell it where its fonts are.
  for (const name of ["base", "controls", "base7", "controls7", "html-manager"]) {
    paths["@jupyter-widgets/" + name] = here + "html-manager/" + name;
  }
  requirejs.config({ paths });
})();
