import { find, get, show } from "./dom.js";
import { openChat } from "./chat.js";
import { openLaw } from "./law.js";
import { openRuns } from "./runs.js";
import { openStreams } from "./streams.js";

const NAMES = ["chat", "streams", "law", "runs"];
const tabs = NAMES.map((name) => find(`#tab-${name}`));
const views = {};

function choose(name, focus = false) {
  for (const [index, other] of NAMES.entries()) {
    const chosen = other === name;
    tabs[index].setAttribute("aria-selected", chosen);
    tabs[index].tabIndex = chosen ? 0 : -1;
    find(`#${other}`).hidden = !chosen;
    if (chosen && focus) tabs[index].focus();
  }
  for (const [other, view] of Object.entries(views)) view.shown(other === name);
}

function chooseByAddress() {
  const name = location.hash.slice(1);
  choose(NAMES.includes(name) ? name : "chat");
}

for (const [index, tab] of tabs.entries()) {
  tab.addEventListener("click", () => go(NAMES[index]));
  tab.addEventListener("keydown", (event) => {
    const step = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
    if (!step) return;
    event.preventDefault();
    const name = NAMES[(index + step + NAMES.length) % NAMES.length];
    go(name);
    tabs[NAMES.indexOf(name)].focus();
  });
}

export function go(name) {
  history.replaceState(null, "", `#${name}`);
  choose(name);
  window.scrollTo(0, 0);
}

views.streams = openStreams();
views.chat = openChat((answer) => { views.streams.look(answer); go("streams"); }, (answers) => views.streams.offer(answers));
views.law = openLaw();
views.runs = openRuns();
window.addEventListener("hashchange", chooseByAddress);
chooseByAddress();

async function follow() {
  let status = null;
  try {
    status = await get("/api/status");
  } catch (error) {
    show(find("#problem"), `The server does not answer: is \`parscale page\` still running? (${error.message})`);
    setTimeout(follow, 3000);
    return;
  }
  show(find("#problem"), status.problem);
  find("#model-line").textContent = status.model + (status.state === "loading" ? ", being loaded" : "");
  views.chat.update(status);
  if (status.state === "loading") setTimeout(follow, 500);
}

follow();
