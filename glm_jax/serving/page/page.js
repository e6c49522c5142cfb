// The page: a text with blanks goes to /v1/fill, what comes is put into them as it comes.

const WORDS = {
  en: {
    language: "Language", text: "Text with blanks", insert: "Insert a blank",
    mask: "Short blank: a word or a few", smask: "Blank of a sentence",
    gmask: "Long text from here on", examples: "Example", choose: "choose …",
    settings: "Settings", temperature: "Temperature (0: likeliest)", top_p: "Top p",
    top_k: "Top k (0: all)", max_tokens: "Tokens a blank, at most",
    repetition_penalty: "Repetition penalty", num_beams: "Beams (1: none)",
    seed: "Seed (empty: any)", key: "API key, if needed", fill: "Fill the blanks", stop: "Stop",
    keys: "Ctrl+Enter fills, Esc stops", answer: "Filled text", copy: "Copy",
    copied: "Copied", loading: "The model is being loaded …", gone: "The server does not answer.",
    ready: "", stopped: "Stopped.",
    figures: (tokens, seconds, first) =>
      `${tokens} tokens, ${seconds} s, the first after ${first} s`,
  },
  zh: {
    language: "语言", text: "带空白的文本", insert: "插入空白", mask: "短空白：一个或几个词",
    smask: "一句话的空白", gmask: "从此处续写长文本", examples: "示例", choose: "请选择……",
    settings: "设置", temperature: "温度（0：取最可能）", top_p: "Top p", top_k: "Top k（0：全部）",
    max_tokens: "每个空白最多词元数", repetition_penalty: "重复惩罚", num_beams: "束宽（1：不用）",
    seed: "随机种子（空：任意）", key: "API 密钥（如需要）", fill: "填空", stop: "停止",
    keys: "Ctrl+Enter 填空，Esc 停止", answer: "填好的文本", copy: "复制", copied: "已复制",
    loading: "模型加载中……", gone: "服务器没有响应。", ready: "", stopped: "已停止。",
    figures: (tokens, seconds, first) => `${tokens} 个词元，${seconds} 秒，首个 ${first} 秒后`,
  },
};
const EXAMPLES = [
  "The capital of France is [MASK].",
  "日本的首都是[MASK]。",
  "The capital of [MASK] is [MASK].",
  "The currency of Poland is",
  "凯旋门位于意大利米兰市古城堡旁。1807年为纪念[MASK]而建，门高25米。",
];
const KINDS = ["[MASK]", "[sMASK]", "[gMASK]"];
const NUMBERS = ["temperature", "top_p", "top_k", "max_tokens", "repetition_penalty", "num_beams",
  "seed"];

const at = (id) => document.getElementById(id);
let words = WORDS.en;
let running = null; // an AbortController while an answer comes

function speak(language) {
  words = WORDS[language];
  document.documentElement.lang = language;
  at("language").value = language;
  remember("language", language);
  for (const element of document.querySelectorAll("[data-text]")) {
    element.textContent = words[element.dataset.text];
  }
  for (const element of document.querySelectorAll("[data-title]")) {
    element.title = words[element.dataset.title];
  }
  for (const element of document.querySelectorAll("[data-label]")) {
    element.setAttribute("aria-label", words[element.dataset.label]);
  }
  at("examples").replaceChildren(new Option(words.choose, ""),
    ...EXAMPLES.map((text) => new Option(text, text)));
}

function remember(name, value) {
  try { localStorage.setItem(name, value); } catch { /* a page may have no memory */ }
}

function remembered(name) {
  try { return localStorage.getItem(name); } catch { return null; }
}

function mark() {
  const parts = at("text").value.split(/(\[[sg]?MASK\])/);
  at("marked").replaceChildren(...parts.map((part, i) => {
    if (i % 2 === 0) return document.createTextNode(part);
    const marked = document.createElement("mark");
    marked.textContent = part;
    return marked;
  }), document.createTextNode("\n"));
  at("marked").scrollTop = at("text").scrollTop;
}

function insert(mask) {
  const text = at("text");
  text.setRangeText(mask, text.selectionStart, text.selectionEnd, "end");
  text.focus();
  mark();
}

function span(kind, text) {
  const element = document.createElement("span");
  element.className = kind;
  element.textContent = text;
  return element;
}

// The text as it was given, with a place for each blank's answer.
function layOut(text) {
  const kind = KINDS.find((mask) => text.includes(mask));
  const parts = kind ? text.split(kind) : [text, ""];
  const blanks = [];
  const elements = [];
  parts.forEach((part, i) => {
    if (i > 0) {
      blanks.push(span("blank", ""));
      elements.push(blanks[i - 1]);
    }
    elements.push(span(i > 0 ? "later" : "text", part));
  });
  at("answer").replaceChildren(...elements);
  if (blanks.length) blanks[0].classList.add("now");
  return blanks;
}

function show(filled) {
  at("answer").replaceChildren(...filled.pieces.map(
    (piece) => span(piece.blank === null ? "text" : "blank", piece.text)));
}

function complain(message) {
  at("error").textContent = message;
  at("error").hidden = !message;
}

function request() {
  const asked = { text: at("text").value, stream: true };
  for (const name of NUMBERS) {
    const value = at(name).value;
    if (value !== "") asked[name] = Number(value);
  }
  if (asked.num_beams > 1) {
    for (const name of ["temperature", "top_p", "top_k", "seed", "repetition_penalty"]) {
      delete asked[name];
    }
  }
  return asked;
}

async function* events(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let held = "";
  for (;;) {
    const { done, value } = await reader.read();
    if (done) return;
    const parts = (held + value).split("\n\n");
    held = parts.pop();
    for (const part of parts) {
      const data = part.replace(/^data: /, "");
      if (data === "[DONE]") return;
      yield JSON.parse(data);
    }
  }
}

async function answer(controller) {
  const began = performance.now();
  const seconds = () => ((performance.now() - began) / 1000).toFixed(2);
  const blanks = layOut(at("text").value);
  const headers = { "Content-Type": "application/json" };
  if (at("key").value) headers.Authorization = `Bearer ${at("key").value}`;
  const response = await fetch("/v1/fill", {
    method: "POST", headers, body: JSON.stringify(request()), signal: controller.signal,
  });
  if (!response.ok) throw new Error((await response.json()).error.message);
  let first = null;
  let current = 0;
  for await (const event of events(response)) {
    if (event.error) throw new Error(event.error.message);
    if (event.object === "fill") {
      show(event);
      at("figures").textContent =
        words.figures(event.usage.completion_tokens, seconds(), first ?? seconds());
    } else if (event.blank !== null && event.blank < blanks.length) {
      first ??= seconds();
      blanks[current].classList.remove("now");
      current = event.blank;
      blanks[current].classList.add("now");
      blanks[current].append(event.text);
    }
  }
}

async function fill() {
  if (running) return;
  running = new AbortController();
  complain("");
  at("figures").textContent = "";
  at("answer").setAttribute("aria-busy", "true");
  at("fill").disabled = true;
  at("stop").disabled = false;
  at("copy").disabled = true;
  try {
    await answer(running);
    at("copy").disabled = false;
  } catch (error) {
    if (error.name === "AbortError") at("figures").textContent = words.stopped;
    else complain(error instanceof TypeError ? words.gone : error.message);
  } finally {
    running = null;
    for (const blank of document.querySelectorAll(".now")) blank.classList.remove("now");
    at("answer").setAttribute("aria-busy", "false");
    at("fill").disabled = false;
    at("stop").disabled = true;
  }
}

async function copy() {
  const text = at("answer").textContent;
  if (navigator.clipboard) {
    await navigator.clipboard.writeText(text);
  } else { // on a page that is not served securely
    getSelection().selectAllChildren(at("answer"));
    document.execCommand("copy");
  }
  at("figures").textContent = words.copied;
}

async function look() {
  let state = words.gone;
  try {
    state = (await fetch("/ready")).ok ? words.ready : words.loading;
  } catch { /* not there */ }
  at("state").textContent = state;
  if (state !== words.ready) return void setTimeout(look, 2000);
  const headers = at("key").value ? { Authorization: `Bearer ${at("key").value}` } : {};
  const models = await fetch("/v1/models", { headers });
  if (models.ok) at("model").textContent = (await models.json()).data[0].id;
}

speak(remembered("language") ?? (navigator.language.startsWith("zh") ? "zh" : "en"));
at("text").value = EXAMPLES[words === WORDS.zh ? 1 : 0];
mark();
look();
at("language").addEventListener("change", (event) => speak(event.target.value));
at("text").addEventListener("input", mark);
at("text").addEventListener("scroll", mark);
at("examples").addEventListener("change", (event) => {
  if (event.target.value) at("text").value = event.target.value;
  mark();
});
for (const button of document.querySelectorAll(".mask")) {
  button.addEventListener("click", () => insert(button.dataset.mask));
}
at("form").addEventListener("submit", (event) => { event.preventDefault(); fill(); });
at("stop").addEventListener("click", () => running?.abort());
at("copy").addEventListener("click", copy);
at("key").addEventListener("change", look);
document.addEventListener("keydown", (event) => {
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) fill();
  if (event.key === "Escape") running?.abort();
});
