// Tells RequireJS where the vendored widget code lies, whatever folder the page is in, over http or from disk.
(function () {
  const here = document.currentScript.src.replace(/[^/]*$/, "");
  requirejs.config({
    paths: {
      anywidget: here + "anywidget/index",
      "@jupyter-widgets/html-manager/dist": here + "html-manager",
    },
  });
})();
