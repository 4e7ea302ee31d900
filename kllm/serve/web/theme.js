// Runs before the first paint, so that a dark page never flashes white.
try {
  const { theme } = JSON.parse(localStorage.getItem("kllm.settings")) || {};
  if (theme) document.documentElement.dataset.theme = theme;
} catch {
  // no storage, or junk in it: the system's theme
}
