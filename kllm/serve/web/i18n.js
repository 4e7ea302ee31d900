// The page's words in English and Chinese. They reach the page as text only.

import { settings } from "./state.js";

const WORDS = {
  en: {
    conversations: "Conversations", newChat: "New chat", filter: "Search", menu: "Show conversations", closeMenu: "Hide conversations",
    import: "Import", export: "Export", imported: "{n} imported", badFile: "That file holds no conversation that can be read.",
    today: "Today", week: "Previous 7 days", older: "Older", noChats: "Conversations are kept in this browser only.", noMatch: "Nothing found.",
    rename: "Rename", delete: "Delete", deleted: "Deleted", undo: "Undo", running: "answering",
    model: "Model", noModel: "no model", adapterOf: "{id} · adapter", showPrompt: "Show the prompt the model sees", settings: "Settings",
    message: "Message", messageHint: "Ask anything", send: "Send (Enter)", stop: "Stop (Esc)", toEnd: "To the end",
    fine: "Runs on your own machine. Answers can be wrong.",
    hello: "What would you like to try?", ideas: "Ideas",
    idea1: "Tell a short story about a lighthouse", idea2: "Why is the sky blue?", idea3: "Write a Python function that reverses a string", idea4: "State Bayes' theorem",
    you: "You", answer: "Answer", copy: "Copy", copyCode: "Copy code", code: "text", edit: "Edit", redo: "Answer again", continue: "Continue",
    older1: "Previous version", newer1: "Next version", chances: "Token probabilities", cancel: "Cancel", save: "Save", sendEdit: "Send",
    thinking: "Thinking", thought: "Thought for {s} s", thoughtSome: "Thoughts", stopped: "stopped", cut: "cut at the token limit",
    tokens: "{n} tokens", rate: "{n} tokens/s", first: "{s} s to the first", prompted: "prompt {n}", cachedOf: "prompt {n} ({c} cached)",
    call: "Calls {name}", toolRuns: "running", toolTook: "{s} s", toolFailed: "failed", result: "Result", giveResult: "The tool's result", sendResult: "Send result", answering: "Answering", done: "Answer complete",
    retry: "Try again", openSettings: "Enter key", retryIn: "Try again in {s} s.",
    offline: "The server cannot be reached. Is kllm serve still running?", key: "The server wants an API key.",
    busy: "The server is busy: its queue is full.", loading: "The server is starting up or shutting down.",
    noSuchModel: "The server does not have this model.", context: "The conversation no longer fits the model's context. Start a new chat, or edit an earlier message.",
    request: "The server refused the request.", server: "The server failed on this request.", cutOff: "The connection broke before the answer was complete.",
    ofContext: "{n} of {limit} tokens", prompt: "What the model sees", promptNote: "The conversation after the chat template. Each shade is one token.", promptEmpty: "Nothing yet: write a message first.",
    appearance: "Appearance", theme: "Theme", auto: "Auto", light: "Light", dark: "Dark", language: "Language",
    behaviour: "Behaviour", system: "System prompt", systemHint: "How the model should behave; for this conversation and new ones", thinkMode: "Thinking", on: "On", off: "Off",
    sampling: "Sampling", samplingNote: "Left empty, the model's own value holds.", reset: "Reset", default: "default",
    temperature: "Temperature", temperatureHint: "0 always takes the likeliest token; higher is more varied", top_p: "Top p", top_pHint: "Only the likeliest tokens that together have this probability",
    top_k: "Top k", top_kHint: "Only this many of the likeliest tokens; 0 is off", min_p: "Min p", min_pHint: "Only tokens at least this likely, relative to the likeliest",
    repetition_penalty: "Repetition penalty", repetition_penaltyHint: "Above 1 makes tokens already used less likely", presence_penalty: "Presence penalty", presence_penaltyHint: "Lowers tokens the answer already has",
    frequency_penalty: "Frequency penalty", frequency_penaltyHint: "Lowers them once per occurrence", max_tokens: "Longest answer", max_tokensHint: "In tokens", seed: "Seed", seedHint: "The same seed gives the same answer",
    stopWords: "Stop at", stopWordsHint: "One text a line; the answer ends before it",
    advanced: "Advanced", logprobs: "Token probabilities", logprobsHint: "Shows each token's chance and what else was likely", tools: "Tools", toolsHint: "A JSON list of OpenAI functions; you play the tool",
    badTools: "The tools in the settings are not a JSON list.", access: "Access", apiKey: "API key", apiKeyHint: "Forgotten when this tab closes", close: "Close", clearAll: "Delete all conversations", sureAll: "Really delete all?",
  },
  zh: {
    conversations: "对话", newChat: "新对话", filter: "搜索", menu: "显示对话列表", closeMenu: "隐藏对话列表",
    import: "导入", export: "导出", imported: "已导入 {n} 个对话", badFile: "这个文件里没有可读的对话。",
    today: "今天", week: "最近 7 天", older: "更早", noChats: "对话只保存在这个浏览器中。", noMatch: "没有找到。",
    rename: "重命名", delete: "删除", deleted: "已删除", undo: "撤销", running: "正在回答",
    model: "模型", noModel: "没有模型", adapterOf: "{id} · 适配器", showPrompt: "查看模型看到的提示词", settings: "设置",
    message: "消息", messageHint: "有什么想问的？", send: "发送（Enter）", stop: "停止（Esc）", toEnd: "到最后",
    fine: "在你自己的机器上运行。回答可能有误。",
    hello: "想试点什么？", ideas: "试试这些",
    idea1: "讲一个关于灯塔的小故事", idea2: "天空为什么是蓝色的？", idea3: "写一个反转字符串的 Python 函数", idea4: "写出贝叶斯定理",
    you: "你", answer: "回答", copy: "复制", copyCode: "复制代码", code: "文本", edit: "编辑", redo: "重新回答", continue: "继续",
    older1: "上一个版本", newer1: "下一个版本", chances: "词元概率", cancel: "取消", save: "保存", sendEdit: "发送",
    thinking: "思考中", thought: "思考了 {s} 秒", thoughtSome: "思考过程", stopped: "已停止", cut: "达到长度上限",
    tokens: "{n} 个词元", rate: "{n} 词元/秒", first: "首词元 {s} 秒", prompted: "提示 {n}", cachedOf: "提示 {n}（缓存 {c}）",
    call: "调用 {name}", toolRuns: "运行中", toolTook: "{s} 秒", toolFailed: "出错", result: "结果", giveResult: "工具的结果", sendResult: "发送结果", answering: "正在回答", done: "回答完毕",
    retry: "重试", openSettings: "填写密钥", retryIn: "请在 {s} 秒后重试。",
    offline: "无法连接服务器。kllm serve 还在运行吗？", key: "服务器需要 API 密钥。",
    busy: "服务器繁忙，队列已满。", loading: "服务器正在启动或关闭。",
    noSuchModel: "服务器没有这个模型。", context: "对话超出了模型的上下文长度。请新建对话，或编辑较早的消息。",
    request: "服务器拒绝了请求。", server: "服务器处理请求时出错。", cutOff: "回答完成之前连接中断了。",
    ofContext: "{n} / {limit} 个词元", prompt: "模型看到的内容", promptNote: "套用对话模板之后的文本，每一段底色是一个词元。", promptEmpty: "还没有内容，请先写一条消息。",
    appearance: "外观", theme: "主题", auto: "自动", light: "浅色", dark: "深色", language: "语言",
    behaviour: "行为", system: "系统提示词", systemHint: "希望模型怎样表现；用于当前和新建的对话", thinkMode: "思考", on: "开", off: "关",
    sampling: "采样", samplingNote: "留空则使用模型自带的值。", reset: "重置", default: "默认",
    temperature: "温度", temperatureHint: "0 总是取最可能的词元，越高越多样", top_p: "Top p", top_pHint: "只取累计概率达到此值的词元",
    top_k: "Top k", top_kHint: "只取最可能的若干个词元，0 为关闭", min_p: "Min p", min_pHint: "概率相对最高者不低于此比例的词元",
    repetition_penalty: "重复惩罚", repetition_penaltyHint: "大于 1 时，已出现的词元更不易再出现", presence_penalty: "存在惩罚", presence_penaltyHint: "降低回答中已有词元的概率",
    frequency_penalty: "频率惩罚", frequency_penaltyHint: "按出现次数降低", max_tokens: "最长回答", max_tokensHint: "以词元计", seed: "随机种子", seedHint: "相同的种子得到相同的回答",
    stopWords: "停止文本", stopWordsHint: "每行一个，回答在它之前结束",
    advanced: "高级", logprobs: "词元概率", logprobsHint: "显示每个词元的概率和其他候选", tools: "工具", toolsHint: "OpenAI 函数的 JSON 列表，由你来扮演工具",
    badTools: "设置中的工具不是 JSON 列表。", access: "访问", apiKey: "API 密钥", apiKeyHint: "关闭此标签页后即清除", close: "关闭", clearAll: "删除全部对话", sureAll: "确定全部删除？",
  },
};

export const language = () => settings.lang || (navigator.language.toLowerCase().startsWith("zh") ? "zh" : "en");

/** A word of the page; {name} stands for a value. */
export function t(key, values = {}) {
  const text = WORDS[language()][key] ?? WORDS.en[key] ?? key;
  return text.replace(/\{(\w+)\}/g, (_, name) => values[name]);
}

/** Puts the words into the fixed parts of the page. */
export function translatePage() {
  document.documentElement.lang = language() === "zh" ? "zh-CN" : "en";
  for (const element of document.querySelectorAll("[data-i18n]")) element.textContent = t(element.dataset.i18n);
  for (const element of document.querySelectorAll("[data-i18n-label]")) {
    element.setAttribute("aria-label", t(element.dataset.i18nLabel));
    if (element.tagName === "BUTTON") element.title = t(element.dataset.i18nLabel);
  }
  for (const element of document.querySelectorAll("[data-i18n-placeholder]")) element.placeholder = t(element.dataset.i18nPlaceholder);
}
