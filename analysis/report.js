"use strict";
// Draws the figures in the page's colours, sorts tables, leafs through the slices of volumes, and
// switches between light and dark.
(() => {
  const page = document.documentElement;
  const dark = matchMedia("(prefers-color-scheme: dark)");
  const content = JSON.parse(document.getElementById("figures").textContent);
  const narrow = matchMedia("(max-width: 620px)");
  const coarse = matchMedia("(pointer: coarse)").matches;
  const config = {
    responsive: true,
    displaylogo: false,
    modeBarButtons: [["toImage", "zoom2d", "pan2d", "resetScale2d"]],
  };

  // on a narrow page the head of a row stands in two lines
  const breakHeads = (layout) => {
    const heads = (layout.annotations || []).filter((note) => note.name === "head");
    for (const head of heads) {
      head.text = head.text.replace("  ·  ", "<br>");
      head.font = { size: 11.5 };
    }
    layout.height += 15 * heads.length;
  };
  // and a map goes without its scale: the values stand in its cells
  const dropScale = (data) => {
    for (const trace of data) if (trace.type === "heatmap") trace.showscale = false;
  };

  const draw = async () => {
    const style = getComputedStyle(page);
    const template = resolve(content.template, style);
    for (const place of document.querySelectorAll("[data-figure]")) {
      const { data, layout } = resolve(content.figures[place.dataset.figure], style);
      layout.template = template;
      if (narrow.matches) {
        breakHeads(layout);
        dropScale(data);
      }
      if (coarse) layout.dragmode = false; // a finger scrolls the page
      const options = { ...config };
      options.displayModeBar = coarse || narrow.matches ? false : "hover";
      options.toImageButtonOptions = { format: "svg", filename: place.dataset.figure };
      try {
        await Plotly.react(place, data, layout, options);
      } catch (error) {
        place.textContent = "This figure could not be drawn: " + error.message;
        place.classList.add("figure-error");
      }
    }
    page.dataset.drawn = "yes";
  };

  const keep = (theme) => {
    try {
      localStorage.setItem("maskstudy-theme", theme);
    } catch {
      // a page opened from a file may have no storage; the choice then lasts until it is closed
    }
  };
  const show = (theme) => {
    page.dataset.theme = theme;
    document.getElementById("theme").textContent = theme === "dark" ? "Light page" : "Dark page";
    return draw();
  };
  let theme = dark.matches ? "dark" : "light";
  try {
    theme = localStorage.getItem("maskstudy-theme") || theme;
  } catch {
    // as above
  }
  if (location.hash === "#dark" || location.hash === "#light") theme = location.hash.slice(1);
  document.getElementById("theme").addEventListener("click", () => {
    theme = page.dataset.theme === "dark" ? "light" : "dark";
    keep(theme);
    show(theme);
  });
  narrow.addEventListener("change", draw);
  addEventListener("beforeprint", () => show("light"));
  addEventListener("afterprint", () => show(theme));

  const value = (row, column) => {
    const cell = row.cells[column];
    const number = Number(cell.dataset.value);
    return cell.dataset.value !== undefined && !Number.isNaN(number) ? number : cell.textContent;
  };
  for (const button of document.querySelectorAll("th button")) {
    button.addEventListener("click", () => {
      const head = button.closest("th");
      const body = head.closest("table").tBodies[0];
      const falling = head.getAttribute("aria-sort") === "ascending";
      for (const other of head.parentNode.cells) other.removeAttribute("aria-sort");
      head.setAttribute("aria-sort", falling ? "descending" : "ascending");
      const rows = [...body.rows].sort((a, b) => {
        const [x, y] = [value(a, head.cellIndex), value(b, head.cellIndex)];
        const order = typeof x === "number" && typeof y === "number" ? x - y : String(x).localeCompare(y);
        return falling ? -order : order;
      });
      body.append(...rows);
    });
  }

  const together = document.getElementById("together");
  const sheets = [...document.querySelectorAll(".slices")];
  for (const sheet of sheets) {
    leafTo(sheet, 0.5);
    sheet.querySelector("input").addEventListener("input", () => {
      const depth = depthOf(sheet);
      for (const other of sheets) {
        if (other === sheet || (together.checked && other.dataset.kind === sheet.dataset.kind)) leafTo(other, depth);
      }
    });
  }
  for (const control of document.querySelectorAll(".turn")) control.hidden = false;

  show(theme);
})();
