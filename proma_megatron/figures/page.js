"use strict";
// Values under the pointer, or under a step chosen with the arrow keys, and groups on and off.
(() => {
  const { panels, margins, colors } = JSON.parse(document.getElementById("data").textContent);
  const hidden = new Set();

  function show(value, percent) {
    return percent ? `${Number((100 * value).toPrecision(4))}%` : String(Number(value.toPrecision(4)));
  }

  // Steps at which a shown group has a value, ascending.
  function stepsOf(panel) {
    const found = new Set();
    panel.groups.forEach((group, index) => {
      if (!hidden.has(index)) group.step.forEach((step) => found.add(step));
    });
    return [...found].sort((a, b) => a - b);
  }

  function nearest(steps, place) {
    return steps.reduce((best, step) => (Math.abs(step - place) < Math.abs(best - place) ? step : best));
  }

  const figures = [...document.querySelectorAll("figure")].map((figure) => {
    const panel = panels[Number(figure.dataset.panel)];
    const svg = figure.querySelector("svg");
    const readout = figure.querySelector(".readout");
    const cross = figure.querySelector(".cross");
    const box = svg.viewBox.baseVal;
    let chosen = null;

    function clear() {
      chosen = null;
      readout.hidden = true;
      if (cross) cross.setAttribute("visibility", "hidden");
    }

    function choose(step) {
      chosen = step;
      const { x0, x1 } = panel.frame;
      const x = margins.left + ((step - x0) / (x1 - x0)) * (box.width - margins.left - margins.right);
      cross.setAttribute("x1", x);
      cross.setAttribute("x2", x);
      cross.setAttribute("visibility", "visible");
      readout.replaceChildren();
      addLine(`step ${step}`, null);
      panel.groups.forEach((group, index) => {
        const at = hidden.has(index) ? -1 : group.step.indexOf(step);
        if (at < 0) return;
        let text = `${group.label}: ${show(group.mean[at], panel.percent)}`;
        if (group.low !== null && group.n[at] > 1) {
          const bounds = [group.low[at], group.high[at]].map((value) => show(value, panel.percent));
          text += ` [${bounds.join(", ")}], n = ${group.n[at]}`;
        }
        addLine(text, index);
      });
      readout.hidden = false;
      // On the side of the crosshair where there is more room.
      const share = (100 * x) / box.width;
      readout.style.left = share < 50 ? `calc(${share}% + 10px)` : "auto";
      readout.style.right = share < 50 ? "auto" : `calc(${100 - share}% + 10px)`;
    }

    function addLine(text, index) {
      const line = document.createElement("div");
      line.textContent = text;
      if (index === null) line.className = "head";
      else line.style.setProperty("--c", `var(--g${index % colors})`);
      readout.append(line);
    }

    if (panel.frame !== null) {
      svg.addEventListener("pointermove", (event) => {
        const steps = stepsOf(panel);
        if (!steps.length) return clear();
        const place = svg.getBoundingClientRect();
        const x = ((event.clientX - place.left) / place.width) * box.width;
        const share = (x - margins.left) / (box.width - margins.left - margins.right);
        const { x0, x1 } = panel.frame;
        choose(nearest(steps, x0 + share * (x1 - x0)));
      });
      svg.addEventListener("pointerleave", clear);
      svg.addEventListener("blur", clear);
      svg.addEventListener("keydown", (event) => {
        const move = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
        const steps = stepsOf(panel);
        if (event.key === "Escape") clear();
        if (!move || !steps.length) return;
        event.preventDefault();
        const at = chosen === null ? (move > 0 ? -1 : steps.length) : steps.indexOf(chosen);
        choose(steps[Math.min(Math.max(at + move, 0), steps.length - 1)]);
      });
    }
    return { figure, clear };
  });

  for (const button of document.querySelectorAll(".legend button")) {
    button.addEventListener("click", () => {
      const index = Number(button.dataset.group);
      const off = !hidden.delete(index);
      if (off) hidden.add(index);
      button.setAttribute("aria-pressed", String(!off));
      for (const { figure, clear } of figures) {
        clear();
        for (const line of figure.querySelectorAll(`g[data-group="${index}"]`)) {
          line.classList.toggle("off", off);
        }
      }
    });
  }
})();
