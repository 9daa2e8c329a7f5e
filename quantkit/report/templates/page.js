"use strict";
(() => {
  const root = document.documentElement;
  const dark = matchMedia("(prefers-color-scheme: dark)");
  const narrow = matchMedia("(max-width: 600px)");
  const touch = matchMedia("(pointer: coarse)");
  const figures = JSON.parse(document.getElementById("figures").textContent);
  const plots = [...document.querySelectorAll(".plot")];
  // Cividis, which the colour-blind can read; what is large stands out against the page.
  const cividis = ["#00224e", "#123570", "#3b496c", "#575d6d", "#707173", "#8a8678", "#a59c74", "#c3b369", "#e1cc55", "#fee838"];

  const isDark = () => (root.dataset.theme ? root.dataset.theme === "dark" : dark.matches);

  function color(name) {
    if (name === "heat") {
      const colors = isDark() ? cividis : [...cividis].reverse();
      return colors.map((value, number) => [number / (colors.length - 1), value]);
    }
    const probe = document.createElement("span");
    probe.style.color = `var(--${name})`;
    document.body.append(probe);
    const found = getComputedStyle(probe).color;
    probe.remove();
    return found;
  }

  // A figure with the theme's colours in place of their names.
  function themed(value, colors) {
    if (Array.isArray(value)) return value.map((item) => themed(item, colors));
    if (value !== null && typeof value === "object") {
      return Object.fromEntries(Object.entries(value).map(([key, item]) => [key, themed(item, colors)]));
    }
    return typeof value === "string" && /^\$[a-z]+\d?$/.test(value) ? colors(value.slice(1)) : value;
  }

  function axis(own, zoom, colors) {
    return {
      automargin: true, zeroline: false, fixedrange: !zoom, gridcolor: colors("grid"), linecolor: colors("line"),
      tickcolor: colors("line"), ...own, title: { standoff: 8, ...own.title },
    };
  }

  function draw(plot) {
    const known = new Map();
    const colors = (name) => {
      if (!known.has(name)) known.set(name, color(name));
      return known.get(name);
    };
    const { data, layout, zoom } = themed(figures[plot.dataset.figure], colors);
    const zooms = zoom && !touch.matches;
    for (const trace of data) {
      if (trace.type === "heatmap") {
        trace.colorbar = {
          orientation: "h", x: 0, xanchor: "left", y: 1, yanchor: "bottom", len: 1, thickness: 10, outlinewidth: 0,
          ...trace.colorbar, title: { side: "top", ...(trace.colorbar || {}).title },
        };
      }
    }
    const ink = colors("ink");
    const full = {
      paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)", margin: { l: 8, r: 16, t: 16, b: 8 },
      font: { family: getComputedStyle(document.body).fontFamily, size: narrow.matches ? 11 : 13, color: ink },
      legend: { orientation: "h", x: 0, y: 1.01, yanchor: "bottom" }, dragmode: zooms ? "zoom" : false,
      hoverlabel: { bgcolor: colors("surface"), bordercolor: colors("muted"), font: { color: ink }, align: "left" },
      ...layout, xaxis: axis(layout.xaxis, zooms, colors), yaxis: axis(layout.yaxis, zooms, colors),
    };
    const config = {
      responsive: true, displaylogo: false, displayModeBar: zooms ? "hover" : false,
      modeBarButtonsToRemove: ["select2d", "lasso2d", "autoScale2d"],
    };
    return window.Plotly.react(plot, data, full, config);
  }

  async function drawAll() {
    for (const plot of plots) {
      // What is folded away has no width yet.
      if (plot.offsetParent === null) continue;
      await draw(plot);
      plot.dataset.drawn = "";
      // Let the page breathe between two plots.
      await new Promise((resolve) => setTimeout(resolve));
    }
    root.dataset.plots = "drawn";
  }

  async function unpack() {
    const packed = Uint8Array.from(atob(document.getElementById("plotly").textContent.trim()), (c) => c.charCodeAt(0));
    const stream = new Blob([packed]).stream().pipeThrough(new DecompressionStream("gzip"));
    const script = document.createElement("script");
    script.textContent = await new Response(stream).text();
    document.head.append(script);
  }

  const theme = document.getElementById("theme");
  theme.addEventListener("click", () => {
    root.dataset.theme = isDark() ? "light" : "dark";
    if (window.Plotly) drawAll();
  });
  for (const query of [dark, narrow]) query.addEventListener("change", () => window.Plotly && drawAll());
  for (const group of document.querySelectorAll("details.group")) {
    group.addEventListener("toggle", () => window.Plotly && group.open && drawAll());
  }
  for (const button of document.querySelectorAll(".copy")) {
    const code = button.parentElement.querySelector("code");
    button.addEventListener("click", async () => {
      try {
        await navigator.clipboard.writeText(code.textContent);
        button.textContent = "Copied";
      } catch {
        getSelection().selectAllChildren(code);
        button.textContent = "Selected";
      }
      setTimeout(() => { button.textContent = "Copy"; }, 2000);
    });
  }

  unpack().then(drawAll).catch((error) => {
    document.getElementById("no-plots").hidden = false;
    for (const plot of plots) plot.style.minHeight = "0";
    throw error;
  });
})();
