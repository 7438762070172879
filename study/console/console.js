"use strict";
// Shows what the console's API tells. Whatever comes from a study is set as text, never as markup.
(() => {
  const root = document.documentElement;
  const main = document.getElementById("main");
  const start = JSON.parse(document.getElementById("start").textContent);
  const parts = location.pathname.split("/").filter(Boolean).map(decodeURIComponent);
  const POLL = 4000;
  const LOG_POLL = 10000;

  // -- making elements --

  const el = (tag, attributes, ...children) => {
    const made = document.createElement(tag);
    for (const [key, value] of Object.entries(attributes || {})) {
      if (key === "on") for (const [event, does] of Object.entries(value)) made.addEventListener(event, does);
      else if (value === true) made.setAttribute(key, "");
      else if (value !== null && value !== undefined && value !== false) made.setAttribute(key, value);
    }
    made.append(...children.flat().filter((child) => child !== null && child !== undefined));
    return made;
  };
  // new content in the place of old; what had the focus has it again
  const fill = (place, ...children) => {
    const key = place.contains(document.activeElement) ? document.activeElement.dataset.key : undefined;
    place.replaceChildren(...children.flat().filter((child) => child !== null && child !== undefined));
    if (key) place.querySelector(`[data-key="${CSS.escape(key)}"]`)?.focus({ preventScroll: true });
  };
  const link = (href, text, attributes) => el("a", { href, "data-key": href, ...attributes }, text);
  const path = (...names) => "/" + names.map(encodeURIComponent).join("/");

  // -- numbers --

  const number = (value, digits = 4) =>
    value === null || value === undefined ? "–" : Number(value).toPrecision(digits).replace(/\.?0+$/, "").replace("-", "−");
  const score = (value) =>
    value === null || value === undefined ? "–" : value.toFixed(Math.abs(value) < 10 ? 3 : 1).replace("-", "−");
  const time = (seconds) => {
    if (seconds === null || seconds === undefined) return "–";
    if (seconds < 90) return `${seconds.toFixed(0)} s`;
    if (seconds < 5400) return `${(seconds / 60).toFixed(0)} min`;
    return `${(seconds / 3600).toFixed(1)} h`;
  };
  const ago = (moment) => (moment ? `${time(Math.max(0, Date.now() / 1000 - moment))} ago` : "–");
  const percent = (share) => `${Math.round(100 * share)} %`;

  // -- talking to the server --

  const call = async (url, options) => {
    const answer = await fetch(url, options).catch(() => {
      throw new Error("The console does not answer.");
    });
    if (answer.status === 401) {
      location.reload();
      return new Promise(() => {});
    }
    const content = await answer.json().catch(() => ({ error: `The console has failed (${answer.status}); its own log says why.` }));
    if (!answer.ok) throw new Error(content.error || answer.statusText);
    return content;
  };
  const said = document.getElementById("said");
  let hush;
  const say = (text, wrong = false) => {
    clearTimeout(hush);
    said.textContent = text;
    said.classList.toggle("wrong", wrong);
    said.hidden = false;
    hush = setTimeout(() => (said.hidden = true), wrong ? 15000 : 7000);
  };
  addEventListener("keydown", (event) => {
    if (event.key === "Escape") said.hidden = true;
  });
  // again and again, while somebody looks
  const every = (milliseconds, does) => {
    let waiting;
    const turn = async () => {
      clearTimeout(waiting);
      if (!document.hidden) {
        try {
          await does();
          main.querySelector("#away")?.remove();
        } catch (error) {
          main.querySelector("#away")?.remove();
          main.prepend(el("p", { id: "away", class: "box bad", role: "alert" }, error.message));
        }
      }
      waiting = setTimeout(turn, milliseconds);
    };
    document.addEventListener("visibilitychange", () => document.hidden || turn());
    turn();
    return turn;
  };

  // -- light and dark --

  const dark = matchMedia("(prefers-color-scheme: dark)");
  const narrow = matchMedia("(max-width: 620px)");
  const coarse = matchMedia("(pointer: coarse)").matches;
  let theme = dark.matches ? "dark" : "light";
  const drawn = new Map(); // place -> figure
  const draw = (place, figure) => {
    drawn.set(place, figure);
    place.style.minHeight = `${figure.layout.height}px`; // or the caption may lie over the figure
    const style = getComputedStyle(root);
    const { data, layout } = resolve(figure, style);
    layout.template = resolve(start.template, style);
    if (coarse) layout.dragmode = false; // a finger scrolls the page
    if (narrow.matches) for (const trace of data) if (trace.type === "heatmap") trace.showscale = false;
    return Plotly.react(place, data, layout, { responsive: true, displayModeBar: false });
  };
  const show = () => {
    root.dataset.theme = theme;
    document.getElementById("theme").textContent = theme === "dark" ? "Light page" : "Dark page";
    for (const [place, figure] of drawn) draw(place, figure);
  };
  try {
    theme = localStorage.getItem("maskstudy-theme") || theme;
  } catch {
    // without storage the choice lasts until the page is closed
  }
  document.getElementById("theme").addEventListener("click", () => {
    theme = theme === "dark" ? "light" : "dark";
    try {
      localStorage.setItem("maskstudy-theme", theme);
    } catch {
      // as above
    }
    show();
  });
  narrow.addEventListener("change", show);

  // -- parts of pages --

  const chip = (state) =>
    el("span", { class: `state state-${state.replace(" ", "-")}` }, state === "held" ? "held, maybe dead" : state);
  const behind = (study) => study.ahead.length
    ? el("p", { class: "bad" }, `behind ${study.ahead.map((one) => `${one.who} ${score(one.value)}`).join(" and ")}`)
    : null;
  // of how many trials, or which part of a budget in hours or operations is spent
  const ofAll = (study) => study.total === null ? `${study.ended} trials` : `${study.ended} of ${study.total} trials`;
  const bar = (study) => {
    const total = Math.max(1, study.total ?? study.suggested);
    const { complete, stopped, ...others } = study.counts;
    const other = Object.values(others).reduce((sum, count) => sum + count, 0);
    const made = el("div", { class: "bar", role: "img", "aria-label": `${ofAll(study)} have ended` });
    for (const [kind, count] of [["complete", complete], ["stopped", stopped], ["other", other]]) {
      const piece = el("i", { class: kind });
      piece.style.width = `${(100 * count) / total}%`;
      made.append(piece);
    }
    return made;
  };
  const table = (caption, heads, lines, attributes) =>
    el("table", attributes,
      el("caption", {}, caption),
      el("thead", {}, el("tr", {}, heads)),
      el("tbody", {}, lines));
  const head = (text, number) => el("th", { scope: "col", class: number ? "number" : null }, text);
  const cell = (content, options = {}) =>
    el("td", { class: [options.number && "number", options.wide && "wide"].filter(Boolean).join(" ") || null, "data-head": options.head }, content);

  // -- all studies --

  const studiesPage = () => {
    document.title = "Studies · maskstudy console";
    const list = el("ul", { class: "studies" });
    const note = el("p", { class: "quiet" });
    main.append(el("h1", {}, "Studies"), el("p", { class: "quiet" }, "in ", el("code", {}, start.storage)), list, note);
    let before = "";
    every(POLL, async () => {
      const told = await call("/api/studies");
      const now = JSON.stringify(told);
      if (now === before) return;
      before = now;
      const words = [];
      if (!told.studies.length) words.push("No study lies here yet. Start one: maskstudy run STUDY.yaml, or maskstudy submit STUDY.yaml --address URL.");
      if (told.strange) words.push(`${told.strange} folder(s) are not shown: a study's folder is no link, and its name is made of a-z, 0-9, - and _.`);
      note.textContent = words.join(" ");
      fill(list, told.studies.map((study) =>
        el("li", {},
          el("div", {},
            el("h2", {}, link(path("study", study.name), study.name)),
            el("p", {}, study.question),
            study.problem ? el("p", { class: "bad" }, study.problem) : null),
          el("div", {},
            el("p", {}, chip(study.state), ` ${ofAll(study)}`),
            bar(study),
            study.spent ? el("p", { class: "quiet" }, study.spent) : null),
          el("div", {},
            study.best ? el("p", {}, `best ${study.best.title} ${score(study.best.value)}`) : el("p", { class: "quiet" }, "no searched trial is complete"),
            study.best ? el("p", { class: "quiet" }, study.best.label) : null,
            behind(study),
            el("p", { class: "quiet" }, `last written ${ago(study.changed)}`)))));
    });
  };

  // -- one study --

  const studyPage = (name) => {
    document.title = `${name} · maskstudy console`;
    const api = path("api", "studies", name);
    const about = el("div");
    const numbers = el("dl", { class: "tiles" });
    const running = el("div", { class: "scroll" });
    const runningBox = el("section", { hidden: true }, el("h2", {}, "Running now"), el("div", { class: "box" }, running));
    const figures = el("div", { class: "grid" });
    const log = el("pre", { tabindex: "0" });
    const logSource = el("p", { class: "quiet" });
    const logBox = el("details", { class: "box" }, el("summary", {}, "Log of the driver"), logSource, log);
    const { box: actions, update: updateActions } = actionsBox(name, api, () => refresh());
    const steer = el("section", { class: "actions", hidden: true }, el("h2", {}, "Steer"), actions);
    const { box: trials, update: updateTrials } = trialsBox(name, api);
    main.append(
      el("p", { class: "eyebrow" }, link("/", "All studies"), ` / ${name}`),
      about, numbers, steer, runningBox,
      el("section", {}, el("h2", {}, "Figures"), figures),
      el("section", {}, el("h2", {}, "Trials"), trials),
      el("section", {}, el("h2", {}, "Log"), logBox));

    let before = "";
    let revision = null;
    let drawnRevision = null; // figures may come late where they take long to draw
    const refresh = every(POLL, async () => {
      const study = await call(api);
      updateActions(study);
      steer.hidden = false;
      const now = JSON.stringify(study);
      if (now !== before) {
        before = now;
        fill(about,
          el("h1", {}, study.question || name),
          el("p", { class: "row" }, chip(study.state), el("span", {}, study.why), study.job ? link(study.job.link, `job in the dashboard (${study.job.status.toLowerCase()})`) : null),
          study.problem ? el("p", { class: "box bad" }, study.problem) : null,
          study.gain?.warning ? el("p", { class: "box bad" }, study.gain.warning.replaceAll("`", "")) : null,
          study.read < study.suggested && !study.problem ? el("p", { class: "quiet", role: "status" }, `Reading what was measured: ${study.read} of ${study.suggested} trials.`) : null,
          bar(study),
          el("p", {}, link(path("report", name), "Open the report", { target: "_blank", rel: "noopener" }), el("span", { class: "quiet" }, " (made from the ledger as it is now; takes a moment)")));
        const tile = (title, value, note, more) => el("div", {}, el("dt", {}, title), el("dd", {}, value, el("small", {}, note), more));
        const others = Object.entries(study.counts).filter(([, count]) => count).map(([kind, count]) => `${count} ${kind}`);
        fill(numbers,
          tile("trials ended", study.total === null ? study.ended : `${study.ended} of ${study.total}`, others.join(", ") || "none yet"),
          study.spent ? tile("budget", study.spent, "spent") : null,
          tile(`best ${study.best ? study.best.title : "searched trial"}`, study.best ? score(study.best.value) : "–", study.best ? study.best.label : "none is complete", behind(study)),
          tile("control", study.control ? score(study.control.value) : "–", study.control ? study.control.label : "not complete"),
          study.gain ? tile("probe gain, best encoder", study.gain.shown, `against ${study.gain.rival}`) : null,
          tile("last written", ago(study.changed), study.state === "running" ? `${study.running.length} running` : study.waiting ? `${study.waiting} begun, not ended` : ""));
        runningBox.hidden = !study.running.length;
        fill(running, table("Trials that run now", [head("trial"), head("arm"), head("phase"), head("reached", true), head("images/s", true)],
          study.running.map((trial) => el("tr", {},
            cell(link(path("study", name, "trial", trial.trial), `${trial.number}`), { head: "trial" }),
            cell(trial.label, { wide: true }),
            cell(trial.phase || "starting", { head: "phase" }),
            cell(percent(trial.progress), { number: true, head: "reached" }),
            cell(number(trial.images_per_second, 3), { number: true, head: "images/s" }))), { class: "cards" }));
      }
      if (study.revision !== revision) {
        revision = study.revision;
        await updateTrials(study);
      }
      if (study.revision !== drawnRevision) drawnRevision = await showFigures(api, figures);
      root.dataset.shown = "yes";
    });
    const readLog = async () => {
      if (!logBox.open) return;
      const told = await call(`${api}/log`);
      logSource.textContent = told.source ? `The last lines of ${told.source}.` : "No driver's words are known here: those of a study started by hand stand where it was started.";
      const atEnd = log.scrollTop + log.clientHeight >= log.scrollHeight - 30;
      if (log.textContent !== told.lines) log.textContent = told.lines;
      if (atEnd) log.scrollTop = log.scrollHeight;
    };
    const log_ = every(LOG_POLL, readLog);
    logBox.addEventListener("toggle", log_);
  };

  const showFigures = async (api, place) => {
    const told = await call(`${api}/figures`);
    for (const item of told.figures) {
      let box = place.querySelector(`[data-figure="${item.name}"]`);
      if (!box) {
        box = el("figure", { "data-figure": item.name }, el("h3", {}), el("div", { role: "img" }), el("figcaption"));
        place.append(box);
      }
      const [title, plot, caption] = box.children;
      title.textContent = item.title;
      caption.textContent = item.says.replaceAll("`", "");
      plot.setAttribute("aria-label", `${item.title}. ${caption.textContent}`);
      if (item.figure) await draw(plot, item.figure);
    }
    return told.revision;
  };

  const actionsBox = (name, api, refresh) => {
    const box = el("div", { class: "box" });
    if (!start.changes) {
      const where = start.cluster ? `--address ${start.cluster}` : `--storage ${start.storage}`;
      box.append(
        el("p", {}, "This console only shows. To change a study, start it with ", el("code", {}, "--allow-changes"), ", or use the command line:"),
        el("pre", {}, `maskstudy resume ${name} ${where}\nmaskstudy stop ${name} ${where}\nmaskstudy extend ${name} --trials 10 --storage ${start.storage}\nmaskstudy enqueue ${name} path=value --storage ${start.storage}`));
      return { box, update: () => {} };
    }
    let busy = false;
    const act = async (action, body, button) => {
      if (busy) return;
      busy = true;
      button.setAttribute("aria-busy", "true");
      say(`${action} …`);
      try {
        const told = await call(`${api}/${action}`, {
          method: "POST",
          headers: { "Content-Type": "application/json", "X-Maskstudy": "1" },
          body: JSON.stringify(body),
        });
        say(told.said);
      } catch (error) {
        say(error.message, true);
      } finally {
        busy = false;
        button.removeAttribute("aria-busy");
      }
      await refresh();
    };
    const resume = el("button", { type: "button", on: { click: () => act("resume", {}, resume) } }, "Resume");
    const stop = el("button", { type: "button", on: { click: () => act("stop", {}, stop) } }, "Stop");
    const count = el("input", { id: "count", type: "number", min: "1", max: "100000", value: "10", required: true });
    const unit = { name: "trials", shown: el("span", { class: "quiet" }, "searched trials") };
    const setUnit = ({ name, words }) => {
      if (unit.name === name) return;
      unit.name = name;
      unit.shown.textContent = words;
      for (const [key, value] of [["min", "0"], ["max", "1e30"], ["step", "any"]]) count.setAttribute(key, value);
      count.value = "";
    };
    const extend = el("button", { type: "submit" }, "Extend");
    const extension = el("form", { class: "row", on: { submit: (event) => {
      event.preventDefault();
      act("extend", { [unit.name]: Number(count.value) }, extend);
    } } }, extend, el("label", { for: "count" }, "by"), count, unit.shown);
    const arm = el("textarea", { id: "arm", spellcheck: "false", "aria-describedby": "allowed" });
    const allowed = el("dl", { class: "facts", id: "allowed" });
    const enqueue = el("button", { type: "submit" }, "Enqueue this arm");
    const settings = () => {
      const found = {};
      for (const line of arm.value.split("\n").map((line) => line.trim()).filter(Boolean)) {
        const at = line.indexOf("=");
        if (at < 1) throw new Error(`given ${line}; expected path=value`);
        const value = line.slice(at + 1).trim();
        let read = value;
        try {
          read = JSON.parse(value);
        } catch {
          // a word
        }
        const key = line.slice(0, at).trim();
        if (Object.hasOwn(found, key)) throw new Error(`${key}: given twice; expected one value`);
        found[key] = read;
      }
      return found;
    };
    const queue = el("details", {}, el("summary", {}, "Enqueue an arm"),
      el("form", { on: { submit: (event) => {
        event.preventDefault();
        try {
          act("enqueue", { settings: settings() }, enqueue);
        } catch (error) {
          say(error.message, true);
        }
      } } },
      el("p", {}, el("label", { for: "arm" }, "One path=value a line; what is not named stays as in the control. Values are numbers, words or JSON.")),
      arm, el("p", { class: "quiet" }, "What the study searches:"), allowed, el("p", {}, enqueue)));
    box.append(el("div", { class: "row" }, resume, stop), extension, queue);
    const update = (study) => {
      const rests = ["interrupted", "finished", "waiting", "at rest"].includes(study.state);
      // disabled only where it had no sense, and never while it has the focus: that would be lost
      const set = (button, off) => (button.disabled = off && document.activeElement !== button);
      set(resume, !rests);
      set(stop, rests && study.state !== "waiting");
      setUnit(study.unit);
      if (!allowed.children.length) {
        fill(allowed, study.search.flatMap((item) => [el("dt", {}, item.path), el("dd", {}, item.allowed)]));
        arm.value = study.search
          .filter((item) => ["number", "string"].includes(typeof study.control_settings[item.path]))
          .map((item) => `${item.path}=${study.control_settings[item.path]}`).join("\n");
      }
    };
    return { box, update };
  };

  const trialsBox = (name, api) => {
    const asked = { offset: 0, order: "number", falling: "1", outcome: "", words: "" };
    const body = el("div", { class: "scroll" });
    const place = el("span", { role: "status" });
    const earlier = el("button", { type: "button", class: "plain" }, "Previous page");
    const later = el("button", { type: "button", class: "plain" }, "Next page");
    const outcome = el("select", { id: "outcome" }, ["", "unfinished", "complete", "stopped", "diverged", "out-of-memory", "failed"].map((kind) => el("option", { value: kind }, kind || "any outcome")));
    const words = el("input", { id: "words", type: "search", placeholder: "words in arm, trial or error", maxlength: "200" });
    let shown = null;
    const read = async () => {
      const told = await call(`${api}/trials?${new URLSearchParams(asked)}`);
      asked.offset = told.offset;
      const end = told.offset + told.trials.length;
      const range = told.total ? `${told.offset + 1} to ${end} of ${told.total} trials` : "no such trial";
      if (place.textContent !== range) place.textContent = range;
      earlier.disabled = told.offset === 0;
      later.disabled = end >= told.total;
      const now = JSON.stringify(told.trials);
      const key = JSON.stringify([now, asked]);
      if (key === shown) return;
      shown = key;
      const sorted = (text, order, isNumber) => el("th", {
        scope: "col", class: isNumber ? "number" : null,
        "aria-sort": asked.order === order ? (asked.falling === "1" ? "descending" : "ascending") : null,
      }, el("button", { type: "button", "data-key": `sort-${order}`, on: { click: () => {
        asked.falling = asked.order === order && asked.falling === "1" ? "0" : "1";
        asked.order = order;
        asked.offset = 0;
        read();
      } } }, text));
      fill(body, table(`Trials of ${name}`, [
        sorted("trial", "number"), sorted("arm", "arm"), head("seed", true), sorted("outcome", "outcome"), head("reached"),
        ...told.objectives.map((objective) => sorted(objective.title, objective.metric, true)), sorted("time", "seconds", true),
      ], told.trials.map((trial) => el("tr", {},
        cell(link(path("study", name, "trial", trial.trial), `${trial.number} · ${trial.trial.slice(0, 6)}`), { head: "trial" }),
        cell([trial.label, trial.why ? el("div", { class: "bad" }, trial.why) : null], { wide: true }),
        cell(`${trial.seed}`, { number: true, head: "seed" }),
        cell(trial.outcome),
        cell(trial.phase ? `${trial.phase} ${percent(trial.progress)}` : "", {}),
        told.objectives.map((objective) => cell(score(trial.values[objective.metric]), { number: true, head: objective.title })),
        cell(time(trial.seconds), { number: true, head: "time" }))), { class: "cards" }));
    };
    const turn = (pages) => {
      asked.offset = Math.max(0, asked.offset + pages * start.page);
      read().catch((error) => say(error.message, true));
    };
    earlier.addEventListener("click", () => turn(-1));
    later.addEventListener("click", () => turn(1));
    const filter = () => {
      asked.outcome = outcome.value;
      asked.words = words.value;
      asked.offset = 0;
      read().catch((error) => say(error.message, true));
    };
    let typing;
    outcome.addEventListener("change", filter);
    words.addEventListener("input", () => {
      clearTimeout(typing);
      typing = setTimeout(filter, 250);
    });
    const box = el("div", { class: "box stack" },
      el("div", { class: "row", role: "search" }, el("label", { for: "outcome" }, "Show"), outcome, el("label", { for: "words" }, "with"), words),
      body, el("div", { class: "row" }, earlier, later, place));
    return { box, update: read };
  };

  // -- one trial --

  const trialPage = (study, name) => {
    document.title = `trial ${name} · ${study} · maskstudy console`;
    const api = path("api", "studies", study, "trials", name);
    const content = el("div");
    main.append(el("p", { class: "eyebrow" }, link("/", "All studies"), " / ", link(path("study", study), study), ` / trial ${name}`), content);
    let before = "";
    const depths = new Map(); // where each sheet of slices was left
    const facts = (pairs) => el("dl", { class: "facts" }, Object.entries(pairs).flatMap(([key, value]) => [el("dt", {}, key), el("dd", {}, `${value}`)]));
    const heads = (picture) => el("div", { class: "columns", "aria-hidden": "true" }, picture.columns.map((column) => el("span", {}, column)));
    const image = (picture, trial) => el("img", { src: `${api}/${encodeURIComponent(picture.name)}.png`, alt: `${picture.title} of ${trial.label}: ${picture.columns.join(" | ")}`, loading: "lazy" });
    const leafed = (picture, trial) => {
      const depth = depths.get(picture.name) ?? 0.5;
      const slider = el("input", { type: "range", min: 1, max: picture.frames, "data-key": picture.name, "aria-label": `${picture.title}, of ${trial.label}`, autocomplete: "off" });
      const box = el("div", { class: "slices" },
        heads(picture),
        el("div", { class: "planes", "aria-hidden": "true" }, picture.planes.map(([name]) => el("span", {}, name))),
        el("div", { class: "window" }, image(picture, trial)),
        el("div", { class: "turn" }, slider, el("span", { class: "at", "aria-hidden": "true" })));
      box.querySelectorAll(".planes span").forEach((plane, index) => { plane.style.flex = `${picture.planes[index][1]} 1 0`; });
      box.querySelector(".window").style.aspectRatio = `${picture.aspect}`;
      slider.addEventListener("input", () => {
        depths.set(picture.name, depthOf(box));
        leafTo(box, depthOf(box));
      });
      leafTo(box, depth);
      return box;
    };
    every(POLL, async () => {
      const trial = await call(api);
      const now = JSON.stringify(trial);
      if (now === before) return;
      before = now;
      drawn.clear();
      const plots = trial.metrics.filter((metric) => metric.values.length > 1 && Object.hasOwn(trial.values, `${metric.phase}/${metric.metric}`));
      const boxes = plots.map((metric) => el("figure", {}, el("h3", {}, `${metric.title} (${metric.phase})`), el("div", { role: "img", "aria-label": `${metric.title} by progress` })));
      fill(content,
        el("h1", {}, trial.label),
        el("p", {}, `Trial ${trial.number}, seed ${trial.seed}, ${trial.origin}: `, el("strong", {}, trial.outcome), ` (${trial.meaning})`, trial.seconds === null ? "" : `, ${time(trial.seconds)}`, trial.attempts.length > 1 ? `, measured in ${trial.attempts.length} attempts` : "", "."),
        trial.problem ? el("p", { class: "box bad" }, trial.problem) : null,
        trial.error ? el("section", {}, el("h2", {}, "Error"), el("pre", { class: "box", tabindex: "0" }, trial.error)) : null,
        plots.length ? el("section", {}, el("h2", {}, "Curves"), el("div", { class: "grid" }, boxes)) : null,
        trial.pictures.length ? el("section", {}, el("h2", {}, "Pictures"), el("div", { class: "grid" }, trial.pictures.map((picture) => el("figure", {},
          el("h3", {}, picture.title),
          picture.frames ? leafed(picture, trial) : [heads(picture), image(picture, trial)])))) : null,
        el("section", {}, el("h2", {}, "Measured"), el("div", { class: "box scroll" }, table("The newest value of each metric", [head("phase"), head("metric"), head("value", true), head("at", true)],
          trial.metrics.map((metric) => el("tr", {}, cell(metric.phase), cell(metric.title), cell(metric.shown, { number: true }), cell(percent(metric.progress.at(-1)), { number: true })))))),
        el("section", {}, el("h2", {}, "Settings"), el("div", { class: "box" }, facts(trial.settings))));
      plots.forEach((metric, index) => draw(boxes[index].children[1], {
        data: [{ type: "scatter", mode: "lines+markers", x: metric.progress.map((share) => 100 * share), y: metric.values, line: { color: "var(--blue)", width: 2 } }],
        layout: { height: 240, margin: { l: 12, r: 16, t: 14, b: 12 }, xaxis: { title: { text: "progress (%)" }, range: [0, 104] }, yaxis: { title: { text: metric.unit || metric.title } } },
      }));
      root.dataset.shown = "yes";
    });
  };

  if (location.hash.startsWith("#token=")) history.replaceState(null, "", location.pathname);
  document.getElementById("mode").textContent = start.changes ? "" : "read-only";
  show();
  if (parts[0] === "study" && parts[2] === "trial") trialPage(parts[1], parts[3]);
  else if (parts[0] === "study") studyPage(parts[1]);
  else studiesPage();
})();
