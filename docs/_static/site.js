// Renders the formulas, and names each cell of a table by its column, for narrow screens.
document.addEventListener("DOMContentLoaded", () => {
  for (const place of document.querySelectorAll(".math")) {
    katex.render(place.textContent, place, {displayMode: place.tagName === "DIV", throwOnError: false})
  }
  for (const table of document.querySelectorAll("article table.docutils")) {
    const names = [...table.querySelectorAll("thead th")].map((heading) => heading.textContent)
    for (const row of table.querySelectorAll("tbody tr")) {
      [...row.cells].forEach((cell, i) => { cell.dataset.column = names[i] || "" })
    }
  }
})
