// The interactive figure of docs/null-space.md: one preserved input K, one weight update dW, in 2D.
// Knows its own element (#null-space-figure) and nothing else; no library, no network.

(function () {
  "use strict";

  const SLIDERS = [
    { name: "kx", label: "K, x", start: 0.8 },
    { name: "ky", label: "K, y", start: 0.3 },
    { name: "wx", label: "ΔW, x", start: 0.6 },
    { name: "wy", label: "ΔW, y", start: 0.7 },
  ];
  const EXAMPLES = [
    { label: "Start", values: [0.8, 0.3, 0.6, 0.7] },
    { label: "ΔW along K", values: [0.8, 0.3, 0.8, 0.3] },
    { label: "ΔW across K", values: [0.8, 0.3, -0.3, 0.8] },
    { label: "K = 0", values: [0, 0, 0.6, 0.7] },
  ];
  const REACH = 1.35; // the plane shows coordinates from -REACH to REACH; no arrow is longer
  const SIZE = 400;

  // ---- the mathematics -------------------------------------------------------------------

  function dot(a, b) {
    return a[0] * b[0] + a[1] * b[1];
  }

  // dW' = dW - (K.dW / K.K) K. A zero K preserves nothing, so nothing is taken off.
  function project(k, w) {
    const square = dot(k, k);
    const scale = square > 0 ? dot(k, w) / square : 0;
    const projected = [w[0] - scale * k[0], w[1] - scale * k[1]];
    const length = Math.hypot(w[0], w[1]);
    return {
      square: square,
      scale: scale,
      projected: projected,
      before: dot(k, w),
      after: dot(k, projected),
      ratio: length > 0 ? Math.hypot(projected[0], projected[1]) / length : null,
    };
  }

  // ---- numbers as text -------------------------------------------------------------------

  function number(value, digits) {
    const text = Math.abs(value).toFixed(digits);
    return (value < 0 && Number(text) !== 0 ? "\u2212" : "") + text;
  }

  function pair(v, digits) {
    return "[" + number(v[0], digits) + ", " + number(v[1], digits) + "]";
  }

  function products(k, w, digits) {
    const factor = (a, b) => "(" + number(a, 2) + " × " + number(b, digits) + ")";
    return factor(k[0], w[0]) + " + " + factor(k[1], w[1]);
  }

  // "0.480 + 0.210", with the sign of the second term in place of the plus.
  function sum(a, b) {
    const second = number(b, 3);
    return number(a, 3) + (second.startsWith("\u2212") ? " \u2212 " + second.slice(1) : " + " + second);
  }

  function steps(k, w, r) {
    const first = {
      title: "What the update does to K",
      lines: [
        "K·ΔW = " + products(k, w, 2),
        "= " + sum(k[0] * w[0], k[1] * w[1]) + " = " + number(r.before, 3),
      ],
    };
    if (r.square === 0) {
      return [
        first,
        {
          title: "The part of ΔW along K",
          lines: [
            "|K|² = 0: there is no direction to take off.",
            "The row space is the origin alone, the null space the whole plane.",
          ],
        },
        { title: "The projected update", lines: ["ΔW' = ΔW = " + pair(w, 2)] },
        { title: "Check", lines: ["K·ΔW' = 0, as for every ΔW: nothing is preserved."] },
      ];
    }
    const part = [r.scale * k[0], r.scale * k[1]];
    return [
      first,
      {
        title: "The part of ΔW along K",
        lines: [
          "|K|² = " + sum(k[0] * k[0], k[1] * k[1]) + " = " + number(r.square, 3),
          "K·ΔW / |K|² = " + number(r.before, 3) + " / " + number(r.square, 3) +
            " = " + number(r.scale, 3),
        ],
      },
      {
        title: "The projected update",
        lines: [
          "ΔW' = ΔW \u2212 " +
            (r.scale < 0 ? "(" + number(r.scale, 3) + ")" : number(r.scale, 3)) + " × K",
          "= " + pair(w, 2) + " \u2212 " + pair(part, 3),
          "= " + pair(r.projected, 3),
        ],
      },
      {
        title: "Check",
        lines: [
          "K·ΔW' = " + products(k, r.projected, 3),
          "= " + sum(k[0] * r.projected[0], k[1] * r.projected[1]) + " = " + number(r.after, 3),
        ],
      },
    ];
  }

  function sentence(w, r) {
    if (r.ratio === null) return "ΔW is zero: there is no update to project.";
    if (r.square === 0) return "K is zero, so nothing is preserved: the whole update is kept.";
    const kept = Math.round(100 * r.ratio) + " % of its length";
    if (r.ratio < 1e-9) return "ΔW lies in the row space of K: all of it is taken off.";
    if (Math.abs(r.before) < 1e-9) return "ΔW lies in the null space of K already: all is kept.";
    return "The update would have changed the output for K by " + number(r.before, 3) +
      "; projected, it changes it by " + number(r.after, 3) + " and keeps " + kept + ".";
  }

  // ---- elements --------------------------------------------------------------------------

  function element(name, attributes, children) {
    const made = document.createElement(name);
    for (const key of Object.keys(attributes || {})) made.setAttribute(key, attributes[key]);
    for (const child of children || []) made.append(child);
    return made;
  }

  function shape(name, attributes) {
    const made = document.createElementNS("http://www.w3.org/2000/svg", name);
    for (const key of Object.keys(attributes)) made.setAttribute(key, attributes[key]);
    return made;
  }

  const toX = (x) => SIZE / 2 + (x / REACH) * (SIZE / 2);
  const toY = (y) => SIZE / 2 - (y / REACH) * (SIZE / 2);

  function lineAlong(direction, cls, width) {
    const far = 3 / Math.hypot(direction[0], direction[1]);
    const attributes = {
      class: cls,
      x1: toX(-far * direction[0]), y1: toY(-far * direction[1]),
      x2: toX(far * direction[0]), y2: toY(far * direction[1]),
    };
    if (width) attributes["stroke-width"] = width;
    return shape("line", attributes);
  }

  // A line with a head of constant size, and its name beyond the tip.
  function arrow(v, cls, text) {
    const group = shape("g", { class: "ns-arrow " + cls });
    const length = Math.hypot(v[0], v[1]);
    const x = toX(v[0]);
    const y = toY(v[1]);
    if (length < 0.02) {
      group.append(shape("circle", { cx: x, cy: y, r: 5 }));
    } else {
      const ux = v[0] / length;
      const uy = -v[1] / length;
      const head = Math.min(13, (length / REACH) * (SIZE / 2));
      group.append(
        shape("line", { x1: toX(0), y1: toY(0), x2: x - ux * head * 0.8, y2: y - uy * head * 0.8 }),
        shape("polygon", {
          points: [
            [x, y],
            [x - ux * head - uy * head * 0.45, y - uy * head + ux * head * 0.45],
            [x - ux * head + uy * head * 0.45, y - uy * head - ux * head * 0.45],
          ].map((p) => p.join(",")).join(" "),
        })
      );
    }
    const away = length < 0.02 ? [0.7, 0.7] : [v[0] / length, v[1] / length];
    const label = shape("text", {
      x: Math.min(SIZE - 22, Math.max(22, x + 20 * away[0])),
      y: Math.min(SIZE - 10, Math.max(16, y - 16 * away[1] + 5)),
    });
    label.textContent = text;
    group.append(label);
    return group;
  }

  function draw(svg, k, w, r) {
    svg.replaceChildren();
    svg.setAttribute(
      "aria-label",
      "Plane with K " + pair(k, 2) + ", ΔW " + pair(w, 2) + " and ΔW' " + pair(r.projected, 2)
    );
    if (r.square === 0) {
      svg.append(shape("rect", { class: "ns-null-region", width: SIZE, height: SIZE }));
    } else {
      const across = lineAlong([-k[1], k[0]], "ns-null-band", 46);
      svg.append(across);
    }
    for (const at of [-1, -0.5, 0, 0.5, 1]) {
      const cls = at === 0 ? "ns-axis" : "ns-grid";
      svg.append(
        shape("line", { class: cls, x1: toX(at), x2: toX(at), y1: 0, y2: SIZE }),
        shape("line", { class: cls, x1: 0, x2: SIZE, y1: toY(at), y2: toY(at) })
      );
      if (Math.abs(at) === 1) {
        const a = shape("text", { class: "ns-tick", x: toX(at), y: toY(0) + 15 });
        const b = shape("text", { class: "ns-tick", x: toX(0) - 14, y: toY(at) + 4 });
        a.textContent = b.textContent = number(at, 0);
        svg.append(a, b);
      }
    }
    if (r.square !== 0) {
      svg.append(lineAlong([-k[1], k[0]], "ns-null-line"), lineAlong(k, "ns-row-line"));
    }
    svg.append(
      shape("line", {
        class: "ns-removed",
        x1: toX(w[0]), y1: toY(w[1]), x2: toX(r.projected[0]), y2: toY(r.projected[1]),
      }),
      arrow(k, "ns-k", "K"),
      arrow(w, "ns-w", "ΔW"),
      arrow(r.projected, "ns-p", "ΔW'")
    );
  }

  // ---- the figure ------------------------------------------------------------------------

  function build(root) {
    const inputs = {};
    const shown = {};
    const svg = shape("svg", { viewBox: "0 0 " + SIZE + " " + SIZE, role: "img" });

    const controls = element("div", { class: "ns-controls" });
    for (const slider of SLIDERS) {
      const id = "ns-" + slider.name;
      inputs[slider.name] = element("input", {
        id: id, type: "range", min: -1, max: 1, step: 0.01, value: slider.start,
        class: slider.name[0] === "k" ? "ns-k" : "ns-w",
      });
      shown[slider.name] = element("span", { class: "ns-number" });
      controls.append(
        element("div", { class: "ns-slider" }, [
          element("label", { for: id }, [slider.label]), inputs[slider.name], shown[slider.name],
        ])
      );
    }
    const examples = element("div", { class: "ns-examples" });
    for (const example of EXAMPLES) {
      const button = element("button", { type: "button" }, [example.label]);
      button.addEventListener("click", function () {
        SLIDERS.forEach((slider, i) => { inputs[slider.name].value = example.values[i]; });
        update();
      });
      examples.append(button);
    }
    const readouts = element("dl", { class: "ns-readouts" });
    for (const [id, text] of [
      ["before", "K·ΔW before"], ["after", "K·ΔW' after"], ["ratio", "|ΔW'| / |ΔW|"],
      ["projected", "ΔW'"],
    ]) {
      shown[id] = element("dd", { id: "ns-" + id });
      readouts.append(element("div", {}, [element("dt", {}, [text]), shown[id]]));
    }
    const said = element("p", { id: "ns-sentence", "aria-live": "polite" });
    const arithmetic = element("ol", { id: "ns-steps", class: "ns-steps" });
    const legend = element("ul", { class: "ns-legend" }, [
      ["ns-k", "preserved input K"], ["ns-w", "update ΔW"], ["ns-p", "projected update ΔW'"],
      ["ns-row", "row space of K"], ["ns-null", "null space of K"],
    ].map(([cls, text]) =>
      element("li", {}, [element("span", { class: "ns-key " + cls }), text])));

    function update() {
      const k = [Number(inputs.kx.value), Number(inputs.ky.value)];
      const w = [Number(inputs.wx.value), Number(inputs.wy.value)];
      const r = project(k, w);
      for (const slider of SLIDERS) {
        shown[slider.name].textContent = number(Number(inputs[slider.name].value), 2);
      }
      shown.before.textContent = number(r.before, 3);
      shown.after.textContent = number(r.after, 3);
      shown.ratio.textContent = r.ratio === null ? "\u2013" : number(r.ratio, 3);
      shown.projected.textContent = pair(r.projected, 2);
      // The same values at full precision, for whoever reads the page by program.
      shown.before.dataset.value = r.before;
      shown.after.dataset.value = r.after;
      shown.ratio.dataset.value = r.ratio === null ? "" : r.ratio;
      shown.projected.dataset.value = r.projected.join(",");
      said.textContent = sentence(w, r);
      arithmetic.replaceChildren(
        ...steps(k, w, r).map((step) =>
          element("li", {}, [
            element("strong", {}, [step.title]),
            ...step.lines.map((line) => element("div", { class: "ns-line" }, [line])),
          ]))
      );
      draw(svg, k, w, r);
    }

    for (const name of Object.keys(inputs)) inputs[name].addEventListener("input", update);
    root.replaceChildren(
      element("div", { class: "ns-panes" }, [
        element("div", { class: "ns-plane" }, [svg, legend]),
        element("div", { class: "ns-side" }, [controls, examples, readouts]),
      ]),
      said,
      arithmetic
    );
    update();
  }

  function start() {
    const root = document.getElementById("null-space-figure");
    if (root) build(root);
  }

  if (document.readyState === "loading") document.addEventListener("DOMContentLoaded", start);
  else start();
})();
