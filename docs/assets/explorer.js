// The three figures of docs/explore.md, drawn from measured data (explorer-data.js: EXPLORER).
// Knows its own elements (#explore-...) only; no library, no network.

(function () {
  "use strict";
  if (typeof EXPLORER === "undefined" || !document.getElementById("explore-directions")) return;

  const SVG = "http://www.w3.org/2000/svg";
  const WIDTH = 640;

  // ---- elements --------------------------------------------------------------------------

  function element(name, attributes, text) {
    const node = document.createElement(name);
    for (const key in attributes) node.setAttribute(key, attributes[key]);
    if (text !== undefined) node.textContent = text;
    return node;
  }

  function shape(name, attributes, text) {
    const node = document.createElementNS(SVG, name);
    for (const key in attributes) node.setAttribute(key, attributes[key]);
    if (text !== undefined) node.textContent = text;
    return node;
  }

  function slider(host, label, low, high, step, value, changed) {
    const row = element("label", { class: "explore-slider" }, label);
    const input = element("input", { type: "range", min: low, max: high, step: step, value: value });
    const shown = element("output", {});
    input.addEventListener("input", () => changed(Number(input.value), shown));
    row.append(input, shown);
    host.append(row);
    return { input: input, shown: shown };
  }

  const percent = (share) => (share === null ? "–" : (100 * share).toFixed(1) + " %");

  // The area under the ROC curve: how often a harmful prompt stands above a harmless one.
  function auc(harmful, harmless) {
    let wins = 0;
    for (const a of harmful) for (const b of harmless) wins += a > b ? 1 : a === b ? 0.5 : 0;
    return wins / (harmful.length * harmless.length);
  }

  // ---- directions: both classes along each layer's direction -----------------------------

  function directions(host) {
    const positions = Object.keys(EXPLORER.projections);
    const state = { position: positions[0], layer: EXPLORER.residual - 1, alpha: 0 };
    const choice = element("select", { "aria-label": "position" });
    for (const position of positions) choice.append(element("option", { value: position }, position));
    const row = element("label", { class: "explore-slider" }, "position ");
    row.append(choice);
    host.append(row);
    const layers = EXPLORER.projections[positions[0]].layers.length;
    const layer = slider(host, "output of block", 0, layers - 1, 1, state.layer, (v) => {
      state.layer = v;
      draw();
    });
    const alpha = slider(host, "taken out (1 cuts, 2 flips)", 0, 2, 0.05, 0, (v) => {
      state.alpha = v;
      draw();
    });
    choice.addEventListener("change", () => {
      state.position = choice.value;
      draw();
    });
    const picture = shape("svg", { viewBox: "0 0 " + WIDTH + " 170", role: "img" });
    const sentence = element("p", { id: "explore-separation" });
    host.append(picture, sentence);

    function draw() {
      const raw = EXPLORER.projections[state.position].layers[state.layer];
      const moved = {};
      for (const label of ["harmful", "harmless"])
        moved[label] = raw[label].map((p) => (1 - state.alpha) * p);
      layer.shown.textContent = state.layer;
      alpha.shown.textContent = state.alpha.toFixed(2);
      const reach = Math.max(...[...raw.harmful, ...raw.harmless].map(Math.abs)) * 1.08;
      const x = (p) => WIDTH / 2 + ((WIDTH / 2 - 20) * p) / reach;
      picture.replaceChildren(
        shape("line", { x1: x(0), x2: x(0), y1: 8, y2: 132, class: "explore-axis" }),
        shape("text", { x: x(0), y: 150, "text-anchor": "middle" }, "0"),
        shape("text", { x: x(-reach), y: 150 }, (-reach).toFixed(1)),
        shape("text", { x: x(reach), y: 150, "text-anchor": "end" }, reach.toFixed(1)),
        shape("text", { x: WIDTH / 2, y: 167, "text-anchor": "middle" }, "projection on the unit direction"),
      );
      for (const [label, height] of [["harmful", 40], ["harmless", 100]]) {
        picture.append(shape("text", { x: 4, y: height - 20 }, label));
        moved[label].forEach((p, i) =>
          picture.append(
            shape("circle", { cx: x(p), cy: height + ((i * 7) % 17) - 8, r: 4, class: "explore-" + label }),
          ),
        );
      }
      const mean = (v) => v.reduce((a, b) => a + b, 0) / v.length;
      const area = auc(moved.harmful, moved.harmless);
      sentence.dataset.auc = area;
      sentence.textContent =
        "Means " + mean(moved.harmful).toFixed(1) + " (harmful) and " + mean(moved.harmless).toFixed(1) +
        " (harmless); a harmful prompt stands above a harmless one in " + percent(area) + " of pairs.";
    }
    draw();
  }

  // ---- strength: what was measured at each ------------------------------------------------

  function strengths(host) {
    const rows = EXPLORER.strengths;
    const control = slider(host, "strength α", 0, rows.length - 1, 1, 0, draw);
    const picture = shape("svg", { viewBox: "0 0 " + WIDTH + " 220", role: "img" });
    const list = element("dl", { id: "explore-strength" });
    const quote = element("blockquote", {});
    host.append(picture, list, quote);
    const top = rows[rows.length - 1].alpha;
    const x = (a) => 50 + ((WIDTH - 70) * a) / top;
    const y = (share) => 180 - 160 * share;

    function line(name, css) {
      const points = rows.filter((r) => r[name] !== null).map((r) => x(r.alpha) + "," + y(r[name]));
      return shape("polyline", { points: points.join(" "), class: "explore-line " + css });
    }

    function draw(index) {
      const chosen = rows[index];
      control.shown.textContent = chosen.alpha;
      picture.replaceChildren(line("refused", "explore-harmful"), line("harmless", "explore-harmless"));
      for (const share of [0, 0.5, 1])
        picture.append(
          shape("text", { x: 44, y: y(share) + 4, "text-anchor": "end" }, 100 * share + " %"),
          shape("line", { x1: 50, x2: WIDTH - 20, y1: y(share), y2: y(share), class: "explore-grid" }),
        );
      for (const row of rows)
        picture.append(shape("text", { x: x(row.alpha), y: 200, "text-anchor": "middle" }, row.alpha));
      picture.append(
        shape("line", { x1: x(chosen.alpha), x2: x(chosen.alpha), y1: 14, y2: 184, class: "explore-axis" }),
        shape("text", { x: WIDTH - 22, y: 216, "text-anchor": "end" }, "strength α"),
      );
      const facts = [
        ["harmful refused", percent(chosen.refused)],
        ["harmless refused", percent(chosen.harmless)],
        ["degenerate", percent(chosen.degenerate)],
        ["KL, nats a token", chosen.kl.toFixed(4)],
      ];
      list.replaceChildren();
      for (const [name, value] of facts) list.append(element("dt", {}, name), element("dd", {}, value));
      quote.replaceChildren(element("p", {}, chosen.prompt), element("p", {}, "→ " + chosen.answer));
    }
    draw(0);
  }

  // ---- search: the front -------------------------------------------------------------------

  function front(host) {
    const trials = EXPLORER.search;
    const picture = shape("svg", { viewBox: "0 0 " + WIDTH + " 260", role: "img" });
    const told = element("p", { id: "explore-trial" }, "Choose a point.");
    host.append(picture, told);
    const most = Math.max(...trials.map((t) => t.kl)) * 1.05;
    const x = (kl) => 55 + ((WIDTH - 80) * kl) / most;
    const y = (share) => 210 - 190 * share;
    for (const share of [0, 0.5, 1])
      picture.append(
        shape("text", { x: 48, y: y(share) + 4, "text-anchor": "end" }, 100 * share + " %"),
        shape("line", { x1: 55, x2: WIDTH - 20, y1: y(share), y2: y(share), class: "explore-grid" }),
      );
    for (const part of [0, 0.5, 1])
      picture.append(
        shape("text", { x: x(part * most), y: 230, "text-anchor": "middle" }, (part * most).toFixed(4)),
      );
    picture.append(
      shape("text", { x: WIDTH - 22, y: 252, "text-anchor": "end" }, "first-token KL on harmless prompts (nats)"),
      shape("text", { x: 55, y: 12 }, "refused or degenerate"),
    );
    const line = trials.filter((t) => t.front).sort((a, b) => a.kl - b.kl);
    picture.append(
      shape("polyline", { points: line.map((t) => x(t.kl) + "," + y(t.failed)).join(" "), class: "explore-line explore-after" }),
    );
    for (const trial of trials) {
      const point = shape("circle", {
        cx: x(trial.kl), cy: y(trial.failed), r: trial.best ? 8 : 5, tabindex: 0, role: "button",
        "aria-label": "trial " + trial.number, class: trial.front ? "explore-after" : "explore-other",
      });
      const tell = () => {
        const settings = Object.entries(trial.parameters).map(([k, v]) => k + " " + v).join(", ");
        told.textContent =
          "Trial " + trial.number + (trial.best ? " (the one that is exported)" : "") + ": " +
          percent(trial.failed) + " refused or degenerate, KL " + trial.kl.toFixed(4) + ". " + settings;
      };
      for (const event of ["click", "focus", "mouseenter"]) point.addEventListener(event, tell);
      picture.append(point);
    }
  }

  directions(document.getElementById("explore-directions"));
  strengths(document.getElementById("explore-strengths"));
  front(document.getElementById("explore-front"));
})();
