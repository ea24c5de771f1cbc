"use strict";
const kind = document.getElementById("kind"), className = document.getElementById("class");
function filter() {
  let shown = 0;
  for (const card of document.querySelectorAll(".card")) {
    card.hidden = (kind.value && card.dataset.kind !== kind.value) || (className.value && card.dataset.class !== className.value);
    shown += !card.hidden;
  }
  document.getElementById("shown").textContent = shown;
}
kind.addEventListener("change", filter);
className.addEventListener("change", filter);
for (const [key, layer] of [["a", "truth"], ["d", "prediction"]]) {
  const box = document.getElementById("show-" + layer);
  const show = () => document.body.classList.toggle("hide-" + layer, !box.checked);
  box.addEventListener("change", show);
  document.addEventListener("keydown", event => {
    if (event.key !== key || event.ctrlKey || event.metaKey || event.altKey || event.target.tagName === "SELECT") return;
    box.checked = !box.checked;
    show();
  });
  show();
}
filter();
