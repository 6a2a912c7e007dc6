// The values at the moment that is pointed at, in every picture. Without this script nothing is missing but that.
"use strict";
const { ends, texts } = JSON.parse(document.getElementById("values").textContent);
const plots = [...document.querySelectorAll(".plot")];
const legends = [...document.querySelectorAll(".legend")].map((legend) => [...legend.querySelectorAll("b")]);
const resting = legends.map((values) => values.map((value) => value.textContent));

function show(column, percent) {
  plots.forEach((plot, chart) => {
    const cursor = plot.querySelector(".cursor");
    cursor.hidden = column < 0;
    cursor.style.left = `${percent}%`;
    legends[chart].forEach((value, i) => {
      value.textContent = column < 0 ? resting[chart][i] : texts[chart][i][column];
    });
  });
}

for (const plot of plots) {
  plot.addEventListener("pointermove", (event) => {
    const box = plot.getBoundingClientRect();
    const percent = (100 * (event.clientX - box.left)) / box.width;
    const column = ends.findIndex((end) => end >= percent);
    show(column < 0 ? ends.length - 1 : column, percent);
  });
  plot.addEventListener("pointerleave", () => show(-1, 0));
}
