"use strict";
// A chat over /v1/chat/completions. All text of models and users enters the page as text nodes, never as HTML.
const $ = (id) => document.getElementById(id);
const KEY = "qwen3fast";
const DEFAULTS = {system: "", temperature: "", max_tokens: "", thinking: true, key: ""};

// ---- State, kept in the browser ----
let state = load();
let running = null; // {controller, message} while a reply comes

function load() {
  let stored = null;
  try { stored = JSON.parse(localStorage.getItem(KEY)); } catch { /* not ours, or not allowed */ }
  const fresh = {conversations: [], current: null, settings: {...DEFAULTS}, model: ""};
  if (!stored || !Array.isArray(stored.conversations)) return fresh;
  return {...fresh, ...stored, settings: {...DEFAULTS, ...stored.settings}};
}

function save() {
  try { localStorage.setItem(KEY, JSON.stringify(state)); } catch { say("The browser keeps no more conversations."); }
}

function conversation() {
  let found = state.conversations.find((c) => c.id === state.current);
  if (!found) {
    found = {id: String(Date.now()) + Math.random().toString(16).slice(2), messages: []};
    state.conversations.unshift(found);
    state.current = found.id;
  }
  return found;
}

const titleOf = (c) => (c.messages.find((m) => m.role === "user")?.content || "New conversation").slice(0, 60);

// ---- Markdown, as elements ----
function element(tag, text, className) {
  const made = document.createElement(tag);
  if (text !== undefined) made.textContent = text;
  if (className) made.className = className;
  return made;
}

function inline(parent, text) {
  const pattern = /(`+)([\s\S]+?)\1|\*\*([^*\n]+)\*\*|\*([^*\n]+)\*|\[([^\]\n]+)\]\((https?:\/\/[^\s)]+)\)/g;
  let end = 0;
  for (const m of text.matchAll(pattern)) {
    parent.append(text.slice(end, m.index));
    if (m[2] !== undefined) parent.append(element("code", m[2]));
    else if (m[3] !== undefined) inline(parent.appendChild(element("strong")), m[3]);
    else if (m[4] !== undefined) inline(parent.appendChild(element("em")), m[4]);
    else {
      const link = element("a", m[5]);
      link.href = m[6]; // http and https alone
      link.rel = "noopener noreferrer nofollow";
      link.target = "_blank";
      parent.append(link);
    }
    end = m.index + m[0].length;
  }
  parent.append(text.slice(end));
}

function markdown(text) {
  const out = document.createDocumentFragment();
  const lines = text.split("\n");
  let i = 0;
  const take = (test) => { const found = []; while (i < lines.length && test(lines[i])) found.push(lines[i++]); return found; };
  while (i < lines.length) {
    const line = lines[i];
    let m;
    if ((m = line.match(/^\s*(```+|~~~+)/))) {
      i++;
      const code = take((l) => !l.trim().startsWith(m[1]));
      i++;
      out.appendChild(element("pre")).append(element("code", code.join("\n")));
    } else if ((m = line.match(/^(#{1,6})\s+(.*)/))) {
      inline(out.appendChild(element("h" + Math.min(6, m[1].length + 2))), m[2]);
      i++;
    } else if (/^\s*([-*+]|\d+[.)])\s+/.test(line)) {
      const list = out.appendChild(element(/^\s*\d/.test(line) ? "ol" : "ul"));
      const begin = parseInt(line.trim(), 10);
      if (begin > 1) list.start = begin;
      for (const item of take((l) => /^\s*([-*+]|\d+[.)])\s+/.test(l) || /^\s{2,}\S/.test(l))) {
        if (/^\s*([-*+]|\d+[.)])\s+/.test(item)) list.append(element("li"));
        else list.lastChild.append(" ");
        inline(list.lastChild, item.replace(/^\s*([-*+]|\d+[.)])\s+/, "").trim());
      }
    } else if (/^\s*>/.test(line)) {
      const quoted = take((l) => /^\s*>/.test(l)).map((l) => l.replace(/^\s*>\s?/, ""));
      out.appendChild(element("blockquote")).append(markdown(quoted.join("\n")));
    } else if (/^\s*\|.*\|\s*$/.test(line) && /^\s*\|[\s:|-]+\|\s*$/.test(lines[i + 1] || "")) {
      const table = out.appendChild(element("table"));
      take((l) => /^\s*\|.*\|\s*$/.test(l)).forEach((row, n) => {
        if (n === 1) return;
        const tr = table.appendChild(element("tr"));
        for (const cell of row.trim().slice(1, -1).split("|")) inline(tr.appendChild(element(n ? "td" : "th")), cell.trim());
      });
    } else if (!line.trim()) {
      i++;
    } else {
      const words = [lines[i++], ...take((l) => l.trim() && !/^\s*(```|~~~|#|>|\||[-*+]\s|\d+[.)]\s)/.test(l))];
      inline(out.appendChild(element("p")), words.join("\n"));
    }
  }
  return out;
}

// ---- Drawing ----
function draw() {
  const list = $("conversations");
  list.replaceChildren(...state.conversations.map((c) => {
    const item = element("li"), button = element("button", titleOf(c));
    button.type = "button";
    if (c.id === state.current) button.setAttribute("aria-current", "true");
    button.onclick = () => { stop(); state.current = c.id; save(); draw(); closeMenu(); $("input").focus(); };
    item.append(button);
    return item;
  }));
  $("log").replaceChildren(...conversation().messages.map(drawMessage));
  $("log").scrollTop = $("log").scrollHeight;
  $("send").hidden = Boolean(running);
  $("stop").hidden = !running;
}

function drawMessage(message, index) {
  const box = element("article", undefined, "message " + message.role);
  box.append(element("div", message.role === "user" ? "You" : "Model", "who"));
  if (message.reasoning) {
    const fold = element("details", undefined, "reasoning");
    fold.append(element("summary", "Reasoning"), element("div", message.reasoning, "text"));
    fold.open = Boolean(message.isOpen);
    fold.ontoggle = () => { message.isOpen = fold.open; };
    box.append(fold);
  }
  const body = element("div", undefined, "body");
  if (message.role === "user") body.textContent = message.content;
  else body.append(markdown(message.content || (running?.message === message && !message.reasoning ? "…" : "")));
  box.append(body);
  for (const call of message.tool_calls || []) {
    box.append(element("div", `${call.function.name}(${call.function.arguments})`, "call"));
  }
  if (running?.message !== message) box.append(toolsOf(message, index));
  return box;
}

function toolsOf(message, index) {
  const tools = element("div", undefined, "tools");
  const add = (text, run) => {
    const button = tools.appendChild(element("button", text));
    button.type = "button";
    button.onclick = run;
  };
  if (message.role === "user") add("Edit", () => edit(index));
  else {
    add("Copy", () => navigator.clipboard?.writeText(message.content));
    if (index === conversation().messages.length - 1) add("Regenerate", () => { cutTo(index); reply(); });
  }
  return tools;
}

function drawReply(message) {
  const log = $("log");
  const isAtEnd = log.scrollHeight - log.scrollTop - log.clientHeight < 60;
  const last = log.lastElementChild;
  const drawn = drawMessage(message, conversation().messages.length - 1);
  if (last) last.replaceWith(drawn);
  if (isAtEnd) log.scrollTop = log.scrollHeight;
}

function say(text) { $("status").textContent = text; }

// ---- Doing ----
function cutTo(index) { conversation().messages.splice(index); save(); }

function edit(index) {
  stop();
  $("input").value = conversation().messages[index].content;
  cutTo(index);
  draw();
  $("input").focus();
}

function stop() { running?.controller.abort(); }

function headers() {
  const key = state.settings.key.trim();
  return key ? {Authorization: `Bearer ${key}`} : {};
}

function requestOf(messages) {
  const s = state.settings;
  const sent = messages.map((m) => ({role: m.role, content: m.content, ...(m.tool_calls ? {tool_calls: m.tool_calls} : {})}));
  const body = {model: state.model || undefined, messages: sent, stream: true, stream_options: {include_usage: true},
    chat_template_kwargs: {enable_thinking: s.thinking}};
  if (s.system.trim()) body.messages = [{role: "system", content: s.system}, ...body.messages];
  if (s.temperature !== "") body.temperature = Number(s.temperature);
  if (s.max_tokens !== "") body.max_tokens = Number(s.max_tokens);
  return body;
}

async function* events(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let buffer = "";
  for (;;) {
    const {value, done} = await reader.read();
    if (done) return;
    buffer += value;
    const parts = buffer.split("\n\n");
    buffer = parts.pop();
    for (const part of parts) {
      const data = part.split("\n").filter((l) => l.startsWith("data: ")).map((l) => l.slice(6)).join("");
      if (data && data !== "[DONE]") yield JSON.parse(data);
    }
  }
}

async function reply() {
  const talk = conversation();
  const body = requestOf(talk.messages);
  const message = {role: "assistant", content: "", reasoning: ""};
  talk.messages.push(message);
  running = {controller: new AbortController(), message};
  say("");
  draw();
  const begun = performance.now();
  let first = 0, tokens = 0, isWhole = false;
  try {
    const response = await fetch("v1/chat/completions", {method: "POST", signal: running.controller.signal,
      headers: {"Content-Type": "application/json", ...headers()}, body: JSON.stringify(body)});
    if (!response.ok) throw new Error((await response.json().catch(() => null))?.error?.message || response.statusText);
    for await (const event of events(response)) {
      if (event.error) throw new Error(event.error.message);
      if (event.usage) tokens = event.usage.completion_tokens;
      const choice = event.choices[0];
      if (!choice) continue;
      const delta = choice.delta;
      const hasNews = delta.content || delta.reasoning_content || delta.tool_calls;
      if (hasNews && !first) first = performance.now();
      message.content += delta.content || "";
      message.reasoning += delta.reasoning_content || "";
      if (delta.tool_calls) message.tool_calls = [...(message.tool_calls || []), ...delta.tool_calls];
      if (choice.finish_reason) isWhole = true;
      if (choice.finish_reason === "length") say("The reply was cut off at the limit of tokens.");
      showSpeed(begun, first, tokens);
      if (state.current === talk.id) drawReply(message);
    }
    if (!isWhole) throw new Error("the connection ended before the reply did");
  } catch (error) {
    if (error.name !== "AbortError") say(`No reply: ${error.message}. Regenerate tries again.`);
  }
  showSpeed(begun, first, tokens);
  if (!message.content && !message.reasoning && !message.tool_calls) talk.messages.splice(talk.messages.indexOf(message), 1);
  running = null;
  save();
  draw();
}

function showSpeed(begun, first, tokens) {
  if (!first) return;
  const seconds = (performance.now() - first) / 1000;
  const speed = (tokens - 1) / seconds;
  const words = speed < 100 ? speed.toPrecision(3) : Math.round(speed);
  const rate = tokens > 1 && seconds > 0 ? `${words} tokens/s, ` : "";
  $("speed").textContent = `${rate}first after ${((first - begun) / 1000).toFixed(2)} s`;
}

function send(event) {
  event?.preventDefault();
  const text = $("input").value;
  if (running || !text.trim()) return;
  conversation().messages.push({role: "user", content: text});
  $("input").value = "";
  save();
  reply();
}

function exported(c) {
  const name = {user: "You", assistant: "Model"};
  return c.messages.map((m) => `## ${name[m.role]}\n\n${m.content}\n`).join("\n");
}

function closeMenu() { $("side").classList.remove("open"); $("menu").setAttribute("aria-expanded", "false"); }

async function findModels() {
  try {
    const response = await fetch("v1/models", {headers: headers()});
    if (response.status === 401) { say("This server needs an API key (see Settings)."); return; }
    const models = (await response.json()).data.filter((m) => m.task === "generate");
    $("model").replaceChildren(...models.map((m) => element("option", m.id)));
    if (!models.some((m) => m.id === state.model)) state.model = models[0]?.id || "";
    $("model").value = state.model;
    say("");
  } catch { say("The server does not answer. Reload the page once it runs again."); }
}

function bind() {
  for (const name of Object.keys(DEFAULTS)) {
    const input = $(name), property = input.type === "checkbox" ? "checked" : "value";
    input[property] = state.settings[name];
    input.onchange = () => { state.settings[name] = input[property]; save(); if (name === "key") findModels(); };
  }
  $("form").onsubmit = send;
  $("stop").onclick = stop;
  $("model").onchange = () => { state.model = $("model").value; save(); };
  $("new").onclick = () => { stop(); state.current = null; conversation(); save(); draw(); closeMenu(); $("input").focus(); };
  $("delete").onclick = () => {
    stop();
    state.conversations = state.conversations.filter((c) => c.id !== state.current);
    state.current = state.conversations[0]?.id ?? null;
    conversation(); save(); draw();
  };
  $("export").onclick = () => {
    const link = element("a");
    link.href = URL.createObjectURL(new Blob([exported(conversation())], {type: "text/markdown"}));
    link.download = "conversation.md";
    link.click();
    URL.revokeObjectURL(link.href);
  };
  $("menu").onclick = () => $("menu").setAttribute("aria-expanded", String($("side").classList.toggle("open")));
  $("input").onkeydown = (event) => {
    if (event.key === "Enter" && !event.shiftKey && !event.isComposing) send(event);
  };
  document.onkeydown = (event) => { if (event.key === "Escape") { stop(); closeMenu(); } };
}

bind();
draw();
findModels();
$("input").focus();
