// The questionnaire: one prompt at a time with all its videos. Every answer is kept in this browser at once.

const $ = (id) => document.getElementById(id);
const LETTERS = "ABCDEFGHI";
const NAME = /^(?![. ])[^\p{C}\p{Zl}\p{Zp}/\\]{1,40}$/u;
const ITEMS = STUDY.groups.flatMap((group) => group.items);

let state = null; // {rater, at, started, finished, sent, pages: {prompt: {shown, scores: {video: {item}}, best: {}}}}
let order = [];

// --- what this browser keeps

const keyOf = (rater) => `questionnaire/${STUDY.id}/of/${rater}`;
const LAST = `questionnaire/${STUDY.id}/last`;

function keep() {
  try {
    localStorage.setItem(keyOf(state.rater), JSON.stringify(state));
    localStorage.setItem(LAST, state.rater);
  } catch {
    note("This browser keeps no progress: do not close the page.");
  }
}

function kept(key) {
  try {
    return localStorage.getItem(key);
  } catch {
    return null;
  }
}

// --- elements

function make(tag, properties = {}, ...children) {
  const { dataset, ...rest } = properties;
  const element = Object.assign(document.createElement(tag), rest);
  Object.assign(element.dataset, dataset);
  element.append(...children);
  return element;
}

function show(name) {
  for (const id of ["start", "rating", "done"]) $(id).hidden = id !== name;
  $("bar").hidden = name !== "rating";
  $("who").hidden = name === "start";
  if (name !== "rating") $("videos").replaceChildren(); // nothing plays unseen
}

function note(text) {
  $("note").textContent = text;
}

// --- answers

const page = () => order[state.at];
const answersOf = (prompt) => state.pages[prompt.id] ?? { shown: prompt.videos, scores: {}, best: {} };

// Every question of a prompt in the order in which it is asked: [radio name, its value].
function asked(prompt) {
  const { scores, best } = answersOf(prompt);
  return [
    ...STUDY.groups.flatMap((group) => [
      ...group.items.flatMap((item) => prompt.videos.map((video) => [`${item.name}/${video}`, scores[video]?.[item.name]])),
      [`best/${group.name}`, best[group.name]],
    ]),
    ["best/overall", best.overall],
  ];
}

const isFinished = (prompt) => asked(prompt).every(([, value]) => value !== undefined);

function answer(name, value) {
  const prompt = page();
  const given = (state.pages[prompt.id] ??= answersOf(prompt));
  const [first, second] = name.split("/");
  if (first === "best") given.best[second] = value;
  else (given.scores[second] ??= {})[first] = Number(value);
  note("");
  keep();
  showProgress();
}

function exported() {
  const pages = Object.fromEntries(order.filter(isFinished).map((prompt) => [prompt.id, state.pages[prompt.id]]));
  const { rater, started, finished } = state;
  return JSON.stringify({ format: 1, study: STUDY.id, rater, started, finished, pages });
}

function offer(link) {
  URL.revokeObjectURL(link.href);
  link.href = URL.createObjectURL(new Blob([exported()], { type: "application/json" }));
  link.download = `${state.rater}.json`;
}

// --- one prompt

function radio(name, value, label, about) {
  const input = make("input", { type: "radio", name, value, ariaLabel: about });
  return make("label", { className: "choice" }, input, make("span", { ariaHidden: "true" }, label));
}

function scale(item, video, letter) {
  const name = `${item.name}/${video}`;
  const choices = STUDY.scale.map((words, i) => radio(name, String(i + 1), String(i + 1), `${i + 1}, ${words}`));
  const group = make("fieldset", { className: "scale" }, make("legend", {}, make("span", { className: "unseen" }, `${item.title}, video `), letter));
  group.append(...choices);
  return group;
}

function bestOf(name, title, prompt) {
  const choices = prompt.videos.map((video, i) => radio(`best/${name}`, video, LETTERS[i], `Video ${LETTERS[i]}`));
  return make("fieldset", { className: "best" }, make("legend", {}, title), ...choices);
}

function statement(item, prompt) {
  const words = make("div", { className: "words" }, make("strong", {}, item.title), make("p", {}, item.statement));
  const scales = prompt.videos.map((video, i) => scale(item, video, LETTERS[i]));
  return make("div", { className: "item" }, words, make("div", { className: "scales" }, ...scales));
}

function section(group, prompt) {
  return make("section", {},
    make("h3", {}, group.title),
    make("p", { className: "about" }, group.about),
    ...group.items.map((item) => statement(item, prompt)),
    bestOf(group.name, `${group.title}: which video is best?`, prompt),
  );
}

function figureOf(name, i) {
  const quiet = matchMedia("(prefers-reduced-motion: reduce)").matches;
  const video = make("video", { src: `videos/${name}.mp4`, muted: true, loop: true, autoplay: !quiet, controls: true, playsInline: true });
  video.setAttribute("aria-label", `Video ${LETTERS[i]}`);
  video.disablePictureInPicture = true;
  const caption = make("figcaption", {}, `Video ${LETTERS[i]}`);
  video.addEventListener("error", () => caption.append(make("span", { className: "error" }, " did not load; reload the page")));
  return make("figure", {}, caption, video);
}

function showPrompt() {
  const prompt = page();
  show("rating");
  $("prompt").textContent = `“${prompt.prompt}”`;
  $("videos").replaceChildren(...prompt.videos.map(figureOf));
  $("answers").replaceChildren(
    ...STUDY.groups.map((group) => section(group, prompt)),
    make("section", {}, make("h3", {}, "All in all"), bestOf("overall", "Which video is best?", prompt)),
  );
  for (const [name, value] of asked(prompt)) {
    if (value !== undefined) choose(name, String(value));
  }
  note("");
  showProgress();
  scrollTo(0, 0);
  $("prompt").focus({ preventScroll: true });
}

const choicesOf = (name) => [...$("answers").querySelectorAll(`[name="${CSS.escape(name)}"]`)];

function choose(name, value) {
  choicesOf(name).find((choice) => choice.value === value).checked = true;
}

function showProgress() {
  const open = asked(page()).filter(([, value]) => value === undefined).length;
  $("count").textContent = `Prompt ${state.at + 1} of ${order.length} · ${open ? `${open} answers to give` : "complete"}`;
  $("progress").max = order.length;
  $("progress").value = order.filter(isFinished).length;
  $("back").disabled = state.at === 0;
  $("next").textContent = state.at === order.length - 1 ? "Finish" : "Next";
  offer($("so-far"));
}

function focusOpen(after = null) {
  const names = asked(page());
  const from = after ? names.findIndex(([name]) => name === after) + 1 : 0;
  const found = [...names.slice(from), ...names.slice(0, from)].find(([, value]) => value === undefined);
  const choice = found && choicesOf(found[0])[0];
  choice?.focus();
  choice?.closest("fieldset").scrollIntoView({ block: "nearest" });
  return choice;
}

function go(step) {
  if (step > 0 && !isFinished(page())) {
    focusOpen();
    note("Please answer what is marked first.");
    return;
  }
  if (step > 0 && state.at === order.length - 1) {
    finish();
    return;
  }
  state.at += step;
  keep();
  showPrompt();
}

function playAll() {
  for (const video of $("videos").querySelectorAll("video")) {
    video.currentTime = 0;
    video.play().catch(() => {}); // one that did not load says so itself
  }
}

// --- the end

function finish() {
  const open = order.findIndex((prompt) => !isFinished(prompt));
  if (open >= 0) {
    state.at = open;
    showPrompt();
    return;
  }
  state.finished ??= new Date().toISOString();
  keep();
  showDone();
  $("thanks").focus();
  send();
}

function showDone() {
  show("done");
  offer($("download"));
  sent(state.sent ? "Your answers are stored. You can close this page." : "", state.sent);
}

function sent(text, stored) {
  $("sent").textContent = text;
  $("sent").className = stored ? "stored" : "";
  $("send").hidden = stored || !location.protocol.startsWith("http");
}

async function send() {
  const by_hand = "Please download them and give the file to whoever asked you.";
  if (!location.protocol.startsWith("http")) {
    sent(`Your answers are only in this browser. ${by_hand}`, false);
    return;
  }
  sent("Sending your answers…", false);
  try {
    const response = await fetch("answers", { method: "POST", headers: { "Content-Type": "application/json" }, body: exported() });
    const { message } = await response.json().catch(() => ({ message: `the server said ${response.status}` }));
    if (!response.ok) throw new Error(message);
    state.sent = true;
    keep();
    sent("Your answers are stored. You can close this page.", true);
  } catch (error) {
    sent(`Your answers were not stored (${error.message}). ${by_hand}`, false);
  }
}

// --- begin, and the keyboard

function begin(rater) {
  const before = kept(keyOf(rater));
  state = before ? JSON.parse(before) : { rater, at: 0, started: new Date().toISOString(), pages: {} };
  order = orderFor(STUDY, rater);
  $("who-name").textContent = rater;
  keep();
  if (state.finished) {
    showDone();
    if (!state.sent) send();
  } else {
    showPrompt();
  }
}

function showStart() {
  show("start");
  $("name").value = new URLSearchParams(location.search).get("rater") ?? "";
  $("name").focus();
}

function onKey(event) {
  if ($("rating").hidden || event.ctrlKey || event.metaKey || event.altKey) return;
  const key = event.key.toUpperCase();
  const focused = document.activeElement?.name ?? "";
  if (key === "P") {
    playAll();
  } else if (/^[1-9A-I]$/.test(key)) {
    const choices = focused.includes("/") ? choicesOf(focused) : [];
    const best = focused.startsWith("best/");
    const choice = choices[best ? LETTERS.indexOf(key) : Number(key) - 1];
    if (!choices.length) focusOpen();
    else if (choice) {
      choice.checked = true;
      answer(focused, choice.value);
      if (!focusOpen(focused)) $("next").focus();
    }
  } else {
    return;
  }
  event.preventDefault();
}

$("title").textContent = document.title = STUDY.title;
$("start-about").textContent =
  `You will see ${STUDY.prompts.length} ${STUDY.prompts.length === 1 ? "prompt" : "prompts"}, each with ` +
  `${STUDY.prompts[0].videos.length} videos that were made from it, and ${ITEMS.length} statements about each video.`;
$("name-form").addEventListener("submit", (event) => {
  event.preventDefault();
  const rater = $("name").value.normalize("NFC").trim();
  $("name-error").textContent = NAME.test(rater) ? "" : "A name has no / or \\, and does not begin with a dot.";
  if (NAME.test(rater)) begin(rater);
});
$("answers").addEventListener("change", (event) => answer(event.target.name, event.target.value));
$("answers").addEventListener("submit", (event) => event.preventDefault());
$("change").addEventListener("click", showStart);
$("back").addEventListener("click", () => go(-1));
$("next").addEventListener("click", () => go(1));
$("play").addEventListener("click", playAll);
$("send").addEventListener("click", send);
document.addEventListener("keydown", onKey);

const asking = new URLSearchParams(location.search).get("rater");
const last = kept(LAST);
if (last && kept(keyOf(last)) && (!asking || asking === last)) begin(last);
else showStart();
