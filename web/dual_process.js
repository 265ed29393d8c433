// Shows on the pack's nodes what ComfyUI does not show by itself: the curves of a training, and text results.
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
const CURVES_HEIGHT = 120;
const TEXT_HEIGHT = 60;

function addPanel(node, name, height) {
  const element = document.createElement("div");
  element.style.cssText = "font: 11px monospace; color: var(--input-text, #ddd); overflow: auto; white-space: pre-wrap";
  // Without these, Nodes 2.0 make the node as tall as a long text.
  element.style.contain = "size";
  element.style.minHeight = `${height}px`;
  const widget = node.addDOMWidget(name, name, element, {
    serialize: false,
    hideOnZoom: false,
    getMinHeight: () => height,
    getMaxHeight: () => height,
  });
  widget.serialize = false;
  saveNothingAfter(node, widget);
  return element;
}

// ComfyUI adds the last line as a widget and would save it, behind a gap that a later input of ours would be read from.
function saveNothingAfter(node, widget) {
  const original = node.onSerialize;
  node.onSerialize = function (saved) {
    original?.apply(this, arguments);
    const inputs = this.widgets.indexOf(widget);
    if (inputs >= 0) saved.widgets_values?.splice(inputs);
  };
}

function curve(points, steps, colour) {
  const line = document.createElementNS("http://www.w3.org/2000/svg", "polyline");
  line.setAttribute("points", points.map(([step, score]) => `${(100 * step) / steps},${40 - 40 * score}`).join(" "));
  line.setAttribute("fill", "none");
  line.setAttribute("stroke", colour);
  line.setAttribute("vector-effect", "non-scaling-stroke");
  return line;
}

function legendOf(question, score, colour) {
  const line = document.createElement("div");
  line.title = question;
  line.style.cssText = "overflow: hidden; text-overflow: ellipsis; white-space: nowrap";
  const mark = document.createElement("span");
  mark.style.color = colour;
  mark.textContent = "■ ";
  line.append(mark, `${Math.round(100 * score)} % ${question}`);
  return line;
}

function drawCurves(panel, { steps, questions }) {
  const picture = document.createElementNS("http://www.w3.org/2000/svg", "svg");
  picture.setAttribute("viewBox", "0 0 100 40");
  picture.setAttribute("preserveAspectRatio", "none");
  picture.style.cssText = "display: block; width: 100%; height: 70px; background: #222";
  panel.replaceChildren(picture);
  questions.forEach(({ text, points }, number) => {
    const colour = COLOURS[number % COLOURS.length];
    picture.append(curve(points, steps, colour));
    panel.append(legendOf(text, points.at(-1)[1], colour));
  });
}

function locator(node) {
  return node.graph?.isRootGraph === false ? `${node.graph.id}:${node.id}` : `${node.id}`;
}

function showResult(node, output) {
  const text = (output?.text ?? []).join("\n");
  const panel = node.dualProcessPanel;
  if (node.comfyClass !== TRAINER) {
    panel.textContent = text;
    return;
  }
  panel.replaceChildren();
  output?.curves?.forEach((curves) => drawCurves(panel, curves));
  // ComfyUI shows the trainer's last line itself, but not in every subgraph.
  if (node.graph?.isRootGraph === false) panel.append(text);
}

// The last live picture would hide the pictures before and after. Nodes 2.0 notice only what their own store forgets.
function forgetLivePicture(node) {
  const store = app.extensionManager?._p?._s.get("nodeOutput");
  for (const shown of [store?.nodePreviewImages, app.nodePreviewImages]) delete shown?.[locator(node)];
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
  if (node?.comfyClass === TRAINER) drawCurves(node.dualProcessPanel, detail.curves);
}

function showAllResults(graph, outputs) {
  for (const node of graph?.nodes ?? []) {
    const output = outputs?.[locator(node)];
    if (node.dualProcessPanel && output) showResult(node, output);
    showAllResults(node.subgraph, outputs);
  }
}

app.registerExtension({
  name: "dual_process",
  setup() {
    api.addEventListener("dual_process.progress", onProgress);
  },
  // After another tab and back, or a workflow opened from the queue: the nodes are new ones that have not run.
  onNodeOutputsUpdated(outputs) {
    showAllResults(app.rootGraph ?? app.graph, outputs);
  },
  nodeCreated(node) {
    if (node.comfyClass === TRAINER) node.dualProcessPanel = addPanel(node, "answers", CURVES_HEIGHT);
    else if (WITH_TEXT.includes(node.comfyClass)) node.dualProcessPanel = addPanel(node, "result", TEXT_HEIGHT);
    else return;
    const original = node.onExecuted;
    node.onExecuted = function (output) {
      original?.apply(this, arguments);
      if (node.comfyClass === TRAINER) forgetLivePicture(node);
      showResult(node, output);
    };
  },
});
