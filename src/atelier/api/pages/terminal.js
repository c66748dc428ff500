// Shows the terminals of one sandbox: the one that the page's address names.
"use strict";

const [, sandbox] = location.pathname.match(/^\/sandboxes\/([^/]+)\/terminal$/);
const api = `/api/v1/sandboxes/${sandbox}/terminals`;
const element = (id) => document.getElementById(id);
const TABS_SECONDS = 5;
const RETRY_MAX_SECONDS = 15;

const screen = new Terminal({ scrollback: 10000, cursorBlink: true, fontFamily: "monospace" });
const fit = new FitAddon.FitAddon();
screen.loadAddon(fit);
screen.open(element("screen"));
fit.fit();

let terminals = [];
let shown = "";
let socket = null;
let failures = 0;
let retry = 0;
let isBeginning = false;
// Of what was said long ago nothing is answered again: a program's questions in it have had their answers.
let isReplaying = true;

function say(text, kind = "") {
  element("state").textContent = text;
  element("state").dataset.kind = kind;
}

async function ask(method, path, body) {
  const answer = await fetch(api + path, {
    method,
    headers: body ? { "Content-Type": "application/json" } : {},
    body: body && JSON.stringify(body),
  });
  // Signed out meanwhile: the page's own address leads to the sign-in and back.
  if (answer.status === 401) location.reload();
  const said = answer.status === 204 ? null : await answer.json();
  if (!answer.ok) throw new Error([said.message, said.hint].filter(Boolean).join(": "));
  return said;
}

// Whatever the reason, the page says it, and its buttons go on working.
function doing(work) {
  return async (...given) => {
    try {
      await work(...given);
    } catch (error) {
      say(error.message, "broken");
    }
  };
}

function nameOf(terminal) {
  return terminal.title || terminal.command[0].split("/").pop();
}

function drawTabs() {
  const tabs = terminals.map((terminal) => {
    const tab = document.createElement("button");
    tab.textContent = nameOf(terminal);
    tab.title = terminal.command.join(" ");
    tab.role = "tab";
    tab.ariaSelected = String(terminal.id === shown);
    if (terminal.exit_code !== null) tab.dataset.ended = "";
    tab.onclick = () => show(terminal.id);
    return tab;
  });
  element("tabs").replaceChildren(...tabs);
  const found = terminals.find((terminal) => terminal.id === shown);
  document.title = found ? `${nameOf(found)} - ${sandbox}` : sandbox;
}

async function listTabs(wake = false) {
  terminals = (await ask("GET", `?wake=${wake}`)).items;
  drawTabs();
}

function show(id) {
  clearTimeout(retry);
  shown = id;
  failures = 0;
  history.replaceState(null, "", `#${id}`);
  drawTabs();
  connect();
}

// Coming back by itself, it lets a paused sandbox be: only people wake one.
function connect(wake = true) {
  if (socket) socket.onclose = socket.onmessage = null;
  socket?.close();
  const way = location.protocol === "https:" ? "wss" : "ws";
  const size = `columns=${screen.cols}&rows=${screen.rows}&wake=${wake}`;
  const mine = new WebSocket(`${way}://${location.host}${api}/${shown}/attach?${size}`);
  socket = mine;
  mine.binaryType = "arraybuffer";
  isReplaying = true;
  say("connecting …");
  let isOver = false;
  mine.onmessage = ({ data }) => {
    if (typeof data !== "string") return screen.write(new Uint8Array(data));
    const said = JSON.parse(data);
    if (said.type === "ended" || (said.type === "failed" && said.code === "terminal_not_found")) isOver = true;
    hear(said);
  };
  mine.onclose = () => {
    if (mine !== socket || isOver) return;
    const seconds = Math.min(RETRY_MAX_SECONDS, 0.5 * 2 ** failures++);
    say(`connection lost, trying again in ${seconds.toFixed(0)} s`, "broken");
    retry = setTimeout(() => connect(false), seconds * 1000);
  };
}

function hear(said) {
  const terminal = terminals.find(({ id }) => id === shown);
  if (said.type === "joined") {
    failures = 0;
    screen.reset();
    if (terminal) Object.assign(terminal, said.terminal);
    drawTabs();
    say("connected");
  } else if (said.type === "replayed") {
    // After all of it was shown, and not only taken.
    screen.write("", () => { isReplaying = false; });
  } else if (said.type === "lost") {
    screen.write(`\r\n\x1b[2m[${said.bytes} bytes are kept no more]\x1b[0m\r\n`);
  } else if (said.type === "title") {
    if (terminal) terminal.title = said.title;
    drawTabs();
  } else if (said.type === "resized") {
    screen.resize(said.columns, said.rows);
  } else if (said.type === "ended") {
    if (terminal) terminal.exit_code = said.exit_code;
    drawTabs();
    say(`ended: ${said.status}`);
  } else if (said.type === "failed") {
    say([said.message, said.hint].filter(Boolean).join(": "), "broken");
  }
}

const keys = new TextEncoder();
function type(bytes) {
  if (!isReplaying && socket?.readyState === WebSocket.OPEN) socket.send(bytes);
}
screen.onData((text) => type(keys.encode(text)));
screen.onBinary((text) => type(Uint8Array.from(text, (character) => character.charCodeAt(0))));

// What this window could show; how much of it the terminal has, the smallest of all windows says.
new ResizeObserver(() => {
  const size = fit.proposeDimensions();
  if (!size || !size.cols || !size.rows) return;
  if (socket?.readyState === WebSocket.OPEN) {
    socket.send(JSON.stringify({ type: "resize", columns: size.cols, rows: size.rows }));
  } else {
    screen.resize(size.cols, size.rows);
  }
}).observe(element("screen"));

async function open() {
  const size = fit.proposeDimensions() ?? { cols: 80, rows: 24 };
  const made = await ask("POST", "", { size: { columns: size.cols, rows: size.rows } });
  await listTabs();
  show(made.id);
  screen.focus();
}

element("new").onclick = doing(open);
element("rename").onclick = doing(async () => {
  const title = prompt("What to call this terminal (empty: what its program says)");
  if (title === null) return;
  await ask("PATCH", `/${shown}`, { title });
  await listTabs();
});
element("close").onclick = doing(async () => {
  await ask("DELETE", `/${shown}`);
  await begin();
});

// Whoever opens the page wakes a paused sandbox; the page by itself does not.
async function begin(wake = false) {
  // Waking takes its time: meanwhile nobody is to begin once more, and to open a second terminal.
  if (isBeginning) return;
  isBeginning = true;
  try {
    await listTabs(wake);
    const wanted = terminals.find(({ id }) => id === location.hash.slice(1)) ?? terminals[0];
    if (wanted) show(wanted.id);
    else await open();
  } finally {
    isBeginning = false;
  }
}

doing(begin)(true);
// While the sandbox does not run there is nothing to show yet: it begins once there is.
setInterval(doing(async () => { if (!document.hidden) await (shown ? listTabs() : begin()); }), TABS_SECONDS * 1000);
