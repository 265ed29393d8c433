// Shows on the pack's nodes what ComfyUI does not show by itself: the training curve, and text results.
import { app } from "../../scripts/app.js";
import { api } from "../../scripts/api.js";

const TRAINER = "DualProcessTrainer";
const WITH_TEXT = [
  "DualProcessAskJudge",
  "DualProcessJudgeScore",
  "DualProcessSeenByJudge",
  "DualProcessSaveLoRA",
  "DualProcessReport",
];
const COLOURS = ["#7bd88f", "#5ad4e6", "#fce566", "#fc618d", "#948ae3", "#fd9353"];
const CURVE_HEIGHT = 120;
const SMOOTHED_STEPS = 8; // a step sees only a few pictures, its own score jumps
const TEXT_HEIGHT = 60;

function addPanel(node, name, height) {
  const element = document.createElement("div");
  element.style.cssText = "font: 11px monospace; color: var(--input-text, #ddd); overflow: auto; white-space: pre-wrap";
  const widget = node.addDOMWidget(name, name, element, {
    serialize: false,
    hideOnZoom: false,
    getMinHeight: () => height,
    getMaxHeight: () => height,
  });
  widget.serialize = false;
  return element;
}

function curve(points, steps, colour) {
  const line = document.createElementNS("http://www.w3.org/2000/svg", "polyline");
  line.setAttribute("points", points.map(([step, score]) => `${(100 * step) / steps},${40 - 40 * score}`).join(" "));
  line.setAttribute("fill", "none");
  line.setAttribute("stroke", colour);
  line.setAttribute("vector-effect", "non-scaling-stroke");
  return line;
}

function smoothed(history, question) {
  return history.map(({ step }, index) => {
    const recent = history.slice(Math.max(0, index + 1 - SMOOTHED_STEPS), index + 1);
    return [step, recent.reduce((sum, { scores }) => sum + scores[question], 0) / recent.length];
  });
}

function drawCurves(element, history, steps) {
  const picture = document.createElementNS("http://www.w3.org/2000/svg", "svg");
  picture.setAttribute("viewBox", "0 0 100 40");
  picture.setAttribute("preserveAspectRatio", "none");
  picture.style.cssText = "width: 100%; height: 70px; background: #0004";
  const legend = document.createElement("div");
  history[0].scores.forEach((_, question) => {
    const colour = COLOURS[question % COLOURS.length];
    const points = smoothed(history, question);
    picture.append(curve(points, steps, colour));
    const label = document.createElement("span");
    label.style.color = colour;
    label.textContent = `question ${question + 1}: ${Math.round(100 * points.at(-1)[1])} %   `;
    legend.append(label);
  });
  element.replaceChildren(picture, legend);
}

function afterExecution(node, action) {
  const original = node.onExecuted;
  node.onExecuted = function (output) {
    original?.apply(this, arguments);
    action(output);
  };
}

// The last live picture would hide the pictures before and after. Nodes 2.0 notice only what their own store forgets.
function forgetLivePicture(node) {
  const locator = node.graph?.isRootGraph === false ? `${node.graph.id}:${node.id}` : `${node.id}`;
  const store = app.extensionManager?._p?._s.get("nodeOutput");
  for (const shown of [store?.nodePreviewImages, app.nodePreviewImages]) delete shown?.[locator];
}

// The id of a node inside subgraphs is the path to it: "12:7".
function findNode(path) {
  let node = null;
  let graph = app.rootGraph ?? app.graph;
  for (const id of String(path).split(":")) {
    node = graph?.getNodeById(id);
    graph = node?.subgraph;
  }
  return node;
}

function onProgress({ detail }) {
  const node = findNode(detail.node);
  if (!node) return;
  if (detail.step === 1 || !node.dualProcessHistory) node.dualProcessHistory = [];
  node.dualProcessHistory.push({ step: detail.step, scores: detail.scores });
  drawCurves(node.dualProcessCurve, node.dualProcessHistory, detail.steps);
}

app.registerExtension({
  name: "dual_process",
  setup() {
    api.addEventListener("dual_process.progress", onProgress);
  },
  nodeCreated(node) {
    if (node.comfyClass === TRAINER) {
      node.dualProcessCurve = addPanel(node, "answers", CURVE_HEIGHT);
      afterExecution(node, () => forgetLivePicture(node));
    }
    if (!WITH_TEXT.includes(node.comfyClass)) return;
    const panel = addPanel(node, "result", TEXT_HEIGHT);
    afterExecution(node, (output) => (panel.textContent = (output?.text ?? []).join("\n")));
  },
});
