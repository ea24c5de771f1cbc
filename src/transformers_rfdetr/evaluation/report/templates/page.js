"use strict";
const LAYERS = {t: "truth", p: "prediction"};
function show(layer, shown) {
  document.body.classList.toggle("hide-" + layer, !shown);
  document.getElementById("show-" + layer).checked = shown;
}
function followAddress() {
  const hidden = location.hash.match(/^#hide=(.*)/);
  if (hidden) for (const layer of Object.values(LAYERS)) show(layer, !hidden[1].split(",").includes(layer));
}
for (const layer of Object.values(LAYERS)) {
  const box = document.getElementById("show-" + layer);
  box.addEventListener("change", () => show(layer, box.checked));
  show(layer, box.checked);
}
document.addEventListener("keydown", event => {
  if (event.ctrlKey || event.metaKey || event.altKey) return;
  const layer = LAYERS[event.key];
  if (layer) show(layer, document.body.classList.contains("hide-" + layer));
  if (event.key === "Escape") for (const path of document.querySelectorAll("path.off")) path.classList.remove("off");
});
document.addEventListener("click", event => {
  const path = event.target.closest(".card path");
  if (path) path.classList.toggle("off");
});
addEventListener("hashchange", followAddress);
followAddress();
function markOverflow() {
  for (const box of document.querySelectorAll(".wide")) box.classList.toggle("overflows", box.scrollWidth > box.clientWidth);
}
addEventListener("resize", markOverflow);
markOverflow();
