// Hover and zoom for the charts of charts.py: numbers come from data-* attributes, nothing is loaded or sent.
"use strict";
(() => {
  const numbers = (text) => text.split(" ").map((word) => (word === "-" ? NaN : Number(word)));
  const tip = document.body.appendChild(document.createElement("div"));
  tip.className = "tip";
  tip.hidden = true;

  const round = (low, high, about) => {
    const raw = (high - low) / about, power = 10 ** Math.floor(Math.log10(raw));
    const step = power * [1, 2, 5, 10].find((factor) => factor * power >= 0.7 * raw);
    const found = [];
    for (let i = Math.ceil(low / step - 1e-9); i * step <= high + 1e-9 * step; i++) found.push(i * step + 0);  // no -0
    return found;
  };
  const decades = (low, high, about) => {
    const first = Math.floor(Math.log10(low)), count = Math.ceil(Math.log10(high)) - first + 1;
    const factors = count < about ? [1, 2, 5] : [1];
    const found = [...Array(count).keys()].flatMap((i) => factors.map((factor) => factor * 10 ** (first + i)));
    const inside = found.filter((y) => low <= y && y <= high);
    return inside.length > 1 ? inside : round(low, high, about);
  };
  const shown = (value) => Number(value.toPrecision(4)).toLocaleString("en-US", { maximumSignificantDigits: 5 });
  const element = (name, attributes, content = "") => {
    const made = document.createElementNS("http://www.w3.org/2000/svg", name);
    Object.entries(attributes).forEach(([key, value]) => made.setAttribute(key, value));
    made.textContent = content;
    return made;
  };

  const charts = [...document.querySelectorAll("svg.chart")].map((svg) => {
    const [left, right, top, foot] = numbers(svg.dataset.box);
    const log = svg.dataset.log === "1", scaled = (y) => (log ? Math.log10(y) : y);
    const whole = { x: numbers(svg.dataset.x), y: numbers(svg.dataset.y) };
    const curves = [...svg.querySelectorAll(".curves > [data-xs]")].map((drawn) => ({
      drawn, label: drawn.dataset.label, xs: numbers(drawn.dataset.xs), ys: numbers(drawn.dataset.ys),
    }));
    const seen = (y) => Number.isFinite(y) && (y > 0 || !log);
    let view = whole;
    const across = (x) => left + ((x - view.x[0]) / (view.x[1] - view.x[0])) * (right - left);
    const up = (y) => {
      const [low, high] = view.y.map(scaled);
      return foot - ((scaled(y) - low) / (high - low)) * (foot - top);
    };
    const limits = (from, to) => {
      const inside = curves.flatMap(({ xs, ys }) => ys.filter((y, i) => xs[i] >= from && xs[i] <= to && seen(y)));
      if (inside.length < 2) return whole.y;
      const low = inside.reduce((a, b) => Math.min(a, b)), high = inside.reduce((a, b) => Math.max(a, b));
      if (log) return [low / 1.1, high * 1.1];
      const room = 0.06 * (high - low) || 0.1 * Math.abs(high) || 1;
      return [low - room, high + room];
    };
    const draw = (x) => {
      view = x === null ? whole : { x, y: limits(x[0], x[1]) };
      for (const { drawn, xs, ys } of curves) {
        if (drawn.tagName === "g") {
          [...drawn.children].forEach((dot, i) => {
            if (seen(ys[i])) { dot.setAttribute("cx", across(xs[i])); dot.setAttribute("cy", up(ys[i])); }
          });
          continue;
        }
        let path = "", pen = "M";
        xs.forEach((x, i) => {
          path += seen(ys[i]) ? `${pen}${across(x).toFixed(1)} ${up(ys[i]).toFixed(1)}` : "";
          pen = seen(ys[i]) ? "L" : "M";
        });
        drawn.setAttribute("d", path);
      }
      for (const each of svg.querySelectorAll("[data-at]")) {
        for (const name of each.tagName === "text" ? ["x"] : ["x1", "x2"]) each.setAttribute(name, across(+each.dataset.at));
      }
      for (const each of svg.querySelectorAll("[data-from]")) {
        const from = Math.max(+each.dataset.from, view.x[0]), to = Math.min(+each.dataset.to, view.x[1]);
        const name = each.tagName === "text";
        each.style.display = from < to ? "" : "none";
        each.setAttribute("x", across(name ? (from + to) / 2 : from));
        if (!name) each.setAttribute("width", Math.max(0, across(to) - across(from)));
      }
      svg.querySelector(".x").replaceChildren(
        ...round(...view.x, 10).filter(Number.isInteger).map(
          (x) => element("text", { x: across(x), y: foot + 18 }, x.toLocaleString("en-US"))));
      const few = (log ? decades : round)(...view.y, 5);
      svg.querySelector(".y").replaceChildren(...few.flatMap((y) => [
        element("line", { x1: left, x2: right, y1: up(y), y2: up(y) }), element("text", { x: left - 8, y: up(y) + 4 }, shown(y)),
      ]));
    };

    const hair = svg.querySelector(".hair");
    const step = (event) => {
      const at = new DOMPoint(event.clientX, event.clientY).matrixTransform(svg.getScreenCTM().inverse()).x;
      const part = Math.min(1, Math.max(0, (at - left) / (right - left)));
      return view.x[0] + part * (view.x[1] - view.x[0]);
    };
    let began = null;
    svg.addEventListener("pointerdown", (event) => { began = step(event); svg.setPointerCapture(event.pointerId); });
    svg.addEventListener("pointerup", (event) => {
      const ended = step(event), [from, to] = [Math.min(began, ended), Math.max(began, ended)];
      if (began !== null && to - from >= Math.max(2, 0.01 * (view.x[1] - view.x[0]))) {
        charts.forEach((chart) => chart.draw([Math.floor(from), Math.ceil(to)]));
      }
      began = null;
      hair.style.strokeWidth = "";
    });
    svg.addEventListener("dblclick", () => charts.forEach((chart) => chart.draw(null)));
    svg.addEventListener("pointerleave", () => { tip.hidden = true; hair.style.display = "none"; });
    svg.addEventListener("pointermove", (event) => {
      const at = step(event), lines = [];
      let nearest = null;
      for (const { label, xs, ys } of curves) {
        const inside = xs.map((x, i) => i).filter((i) => seen(ys[i]) && xs[i] >= view.x[0] && xs[i] <= view.x[1]);
        if (!label || !inside.length) continue;
        const i = inside.reduce((best, i) => (Math.abs(xs[i] - at) < Math.abs(xs[best] - at) ? i : best));
        nearest ??= xs[i];
        lines.push(`${label} ${shown(ys[i])}${xs[i] === nearest ? "" : ` at ${xs[i].toLocaleString("en-US")}`}`);
      }
      if (nearest === null) return;
      for (const [name, value] of [["x1", across(nearest)], ["x2", across(nearest)], ["y1", top], ["y2", foot]]) {
        hair.setAttribute(name, value);
      }
      hair.style.display = "inline";
      hair.style.strokeWidth = began === null ? "" : "3";
      tip.textContent = [`step ${nearest.toLocaleString("en-US")}`, ...lines].join("\n");
      tip.hidden = false;
      tip.style.left = `${Math.min(event.pageX + 14, document.documentElement.clientWidth - tip.offsetWidth - 8)}px`;
      tip.style.top = `${event.pageY + 16}px`;
    });
    return { draw };
  });
})();
