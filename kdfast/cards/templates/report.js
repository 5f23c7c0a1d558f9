"use strict";
const form = document.getElementById("filters");
if (form) {
  const articles = [...document.querySelectorAll("article")];
  const texts = articles.map((article) => article.textContent.toLowerCase());
  const choices = ["kind", "own", "other"].filter((name) => form.elements[name]);
  const show = () => {
    const wanted = form.elements.text.value.trim().toLowerCase();
    let count = 0;
    articles.forEach((article, index) => {
      const fits = choices.every((name) => {
        const value = form.elements[name].value;
        return !value || article.dataset[name] === value;
      });
      article.hidden = !(fits && texts[index].includes(wanted));
      count += !article.hidden;
    });
    form.elements.count.value = `${count} of ${articles.length} shown`;
  };
  form.addEventListener("input", show);
  form.addEventListener("submit", (event) => event.preventDefault());
  show();
}
