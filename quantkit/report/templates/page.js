"use strict";
(() => {
  const root = document.documentElement;
  const dark = matchMedia("(prefers-color-scheme: dark)");
  const narrow = matchMedia("(max-width: 600px)");
  const touch = matchMedia("(pointer: coarse)");
  const figures = JSON.parse(document.getElementById("figures").textContent);
  const plots = [...document.querySelectorAll(".plot")];
  // Viridis, which the colour-blind can read. What is large ("heat") or small ("scarce") stands out against the page.
  const viridis = ["#440154", "#482878", "#3e4a89", "#31688e", "#26828e", "#1f9e89", "#35b779", "#6ece58", "#b5de2b", "#fde725"];

  const isDark = () => (root.dataset.theme ? root.dataset.theme === "dark" : dark.matches);

  function color(name) {
    if (name === "heat" || name === "scarce") {
      const colors = isDark() === (name === "heat") ? viridis : [...viridis].reverse();
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
      tickcolor: colors("line"), ...own,
      title: { standoff: 8, font: { size: narrow.matches ? 11 : 13, color: colors("muted") }, ...own.title },
    };
  }

  function draw(plot) {
    const known = new Map();
    const colors = (name) => {
      if (!known.has(name)) known.set(name, color(name));
      return known.get(name);
    };
    const { data, layout, zoom } = themed(figures[plot.dataset.figure], colors);
    const zooms = zoom && !touch.matches && !narrow.matches;
    for (const trace of data) {
      if (narrow.matches && trace.meta) Object.assign(trace, trace.meta.narrow);
      if (trace.type === "heatmap") {
        trace.colorbar = {
          orientation: "h", x: 0, xanchor: "left", y: 1, yanchor: "bottom", len: 1, thickness: 10, outlinewidth: 0,
          ...trace.colorbar, title: { side: "top", ...(trace.colorbar || {}).title },
        };
      }
    }
    // Every second power of ten is enough where there is little room.
    if (narrow.matches && layout.xaxis.type === "log") {
      for (const key of ["tickvals", "ticktext"]) layout.xaxis[key] = layout.xaxis[key].filter((_, n) => n % 2);
    }
    const ink = colors("ink");
    const full = {
      paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)", margin: { l: 8, r: 16, t: 16, b: 8 },
      font: { family: getComputedStyle(document.body).fontFamily, size: narrow.matches ? 11 : 13, color: ink },
      dragmode: zooms ? "zoom" : false,
      modebar: { bgcolor: "rgba(0,0,0,0)", color: colors("muted"), activecolor: ink },
      hoverlabel: { bgcolor: colors("surface"), bordercolor: colors("muted"), font: { color: ink }, align: "left" },
      ...layout, legend: { orientation: "h", x: 0, y: 1.01, yanchor: "bottom", ...layout.legend },
      xaxis: axis(layout.xaxis, zooms, colors), yaxis: axis(layout.yaxis, zooms, colors),
    };
    const config = {
      responsive: true, displaylogo: false, displayModeBar: zooms ? "hover" : false,
      modeBarButtons: [["zoom2d", "pan2d", "zoomIn2d", "zoomOut2d", "resetScale2d", "toImage"]],
    };
    return window.Plotly.react(plot, data, full, config);
  }

  async function drawAll() {
    for (const plot of plots) {
      // What is folded away has no width yet.
      if (plot.closest("details:not([open])")) continue;
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
  // A link to what is folded away unfolds it.
  const unfold = () => {
    const group = location.hash && document.getElementById(location.hash.slice(1));
    if (group && group.tagName === "DETAILS") group.open = true;
  };
  addEventListener("hashchange", unfold);
  unfold();
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
