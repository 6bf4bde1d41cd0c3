"""What runs in the browser: the style of the page, its keys, and the brush that draws masks."""

from __future__ import annotations

STYLE = """
.gradio-container { max-width: 1500px !important; margin: 0 auto; }
footer { display: none !important; }
/* Keyboard users see where they are. */
:is(button, input, textarea, canvas, a, [tabindex]):focus-visible {
  outline: 3px solid var(--color-accent) !important; outline-offset: 1px;
}
#title h1 { margin: 0; font-size: 1.4rem; }
#title p { margin: 0; overflow-wrap: anywhere; }
#title, #status { padding: 0 .2rem; }
#status { min-height: 2.6rem; }
#new_seed { align-self: end; height: 2.75rem; }
#status progress { width: 100%; height: .6rem; accent-color: var(--color-accent); }
#status p { margin: 0 0 .2rem; }
.caption-label { display: none; }
#settings { max-height: 24rem; overflow: auto; }
"""

# Ctrl+Enter generates, Escape cancels.
KEYS = """() => {
  const press = (name) => {
    const button = document.querySelector(`#${name}`);
    if (button && !button.disabled) { button.click(); return true; }
  };
  document.addEventListener('keydown', (event) => {
    const generates = event.key === 'Enter' && (event.ctrlKey || event.metaKey);
    if (generates ? press('generate') : event.key === 'Escape' && press('cancel')) event.preventDefault();
  }, true);
}"""

# The value of the brush is JSON: {"image": URL, "mask": URL of a PNG, or "" if nothing is drawn}.
BRUSH_HTML = """
<div class="brush" hidden>
  <p>Inpainting: paint over what is to be generated anew. Without paint, the whole image is.</p>
  <canvas tabindex="0" role="img"
    aria-label="Brush: paint over what is to be generated anew. Arrow keys move, Space paints."></canvas>
  <div class="tools">
    <label>Brush <input type="range" min="1" max="40" value="12" aria-label="Size of the brush"></label>
    <label><input type="checkbox"> Erase</label>
    <button type="button">Clear mask</button>
  </div>
</div>
"""
BRUSH_STYLE = """
p { margin: 0 0 .4rem; }
canvas { display: block; max-width: 100%; max-height: 420px; touch-action: none; cursor: crosshair;
  border-radius: 6px; }
.tools { display: flex; flex-wrap: wrap; gap: 1rem; align-items: center; margin-top: .5rem; }
.tools label { display: flex; gap: .4rem; align-items: center; color: var(--body-text-color); }
.tools button { padding: .3rem .8rem; border: 1px solid var(--border-color-primary); border-radius: 6px;
  background: var(--button-secondary-background-fill); color: var(--button-secondary-text-color); }
"""
BRUSH_SCRIPT = """
const SIDE = 1024, COLOUR = 'rgb(255, 0, 128)';
const canvas = element.querySelector('canvas'), screen = canvas.getContext('2d');
const [size, erase, clear] = ['[type=range]', '[type=checkbox]', 'button'].map((each) =>
  element.querySelector(each));
const paint = document.createElement('canvas'), brush = paint.getContext('2d');
const picture = new Image();
let source = '', drawn = false, last = null, cursor = null;

const width = () => Math.max(canvas.width, canvas.height) * size.value / 100;

function show() {
  screen.globalAlpha = 1;
  screen.drawImage(picture, 0, 0, canvas.width, canvas.height);
  screen.globalAlpha = 0.6;
  screen.drawImage(paint, 0, 0);
  if (!cursor) return;
  screen.globalAlpha = 1;
  screen.lineWidth = Math.max(canvas.width / 300, 1);
  for (const [colour, more] of [['black', 0], ['white', screen.lineWidth]]) {
    screen.strokeStyle = colour;
    screen.beginPath();
    screen.arc(cursor.x, cursor.y, width() / 2 + more, 0, 7);
    screen.stroke();
  }
}

function line(from, to) {
  brush.globalCompositeOperation = erase.checked ? 'destination-out' : 'source-over';
  Object.assign(brush, { lineCap: 'round', lineWidth: width(), strokeStyle: COLOUR });
  brush.beginPath();
  brush.moveTo(from.x, from.y);
  brush.lineTo(to.x + 0.01, to.y);  // a line without length would not be painted
  brush.stroke();
  show();
}

// White where there is paint, black elsewhere; no mask if nothing is left.
function store() {
  const flat = document.createElement('canvas');
  [flat.width, flat.height] = [paint.width, paint.height];
  const context = flat.getContext('2d');
  const fill = (how, colour) => {
    Object.assign(context, { globalCompositeOperation: how, fillStyle: colour });
    context.fillRect(0, 0, flat.width, flat.height);
  };
  const painted = brush.getImageData(0, 0, paint.width, paint.height).data;
  drawn = painted.some((value, index) => index % 4 === 3 && value > 127);
  context.drawImage(paint, 0, 0);
  fill('source-in', 'white');
  fill('destination-over', 'black');
  props.value = JSON.stringify({ image: source, mask: drawn ? flat.toDataURL('image/png') : '' });
}

function place(event) {
  const box = canvas.getBoundingClientRect();
  return { x: (event.clientX - box.left) * canvas.width / box.width,
    y: (event.clientY - box.top) * canvas.height / box.height };
}

canvas.addEventListener('pointerdown', (event) => {
  canvas.setPointerCapture(event.pointerId);
  last = place(event);
  line(last, last);
});
canvas.addEventListener('pointermove', (event) => {
  cursor = place(event);
  if (last) { line(last, cursor); last = cursor; } else { show(); }
});
for (const end of ['pointerup', 'pointercancel']) {
  canvas.addEventListener(end, () => { if (last) { last = null; store(); } });
}
canvas.addEventListener('pointerleave', () => { cursor = null; show(); });
canvas.addEventListener('blur', () => { cursor = null; show(); });
canvas.addEventListener('keydown', (event) => {
  const moves = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1], ' ': [0, 0] };
  const move = moves[event.key];
  if (!move) return;
  event.preventDefault();
  cursor ??= { x: canvas.width / 2, y: canvas.height / 2 };
  const within = (value, most) => Math.min(Math.max(value, 0), most);
  cursor = { x: within(cursor.x + move[0] * width() / 2, canvas.width),
    y: within(cursor.y + move[1] * width() / 2, canvas.height) };
  if (event.key === ' ') { line(cursor, cursor); store(); } else { show(); }
});
clear.addEventListener('click', () => {
  brush.clearRect(0, 0, paint.width, paint.height);
  show();
  store();
});

function load() {
  const { image, mask } = props.value ? JSON.parse(props.value) : { image: '', mask: '' };
  source = image;
  element.querySelector('.brush').hidden = !image;
  if (!image) return;
  picture.onload = () => {
    const longest = Math.max(picture.naturalWidth, picture.naturalHeight);
    const scale = Math.min(Math.max(longest, SIDE / 2), SIDE) / longest;
    for (const each of [canvas, paint]) {
      each.width = Math.max(Math.round(picture.naturalWidth * scale), 1);
      each.height = Math.max(Math.round(picture.naturalHeight * scale), 1);
    }
    cursor = null;
    show();
    if (!mask) return;
    const earlier = new Image();
    earlier.onload = () => {
      brush.drawImage(earlier, 0, 0, paint.width, paint.height);
      const pixels = brush.getImageData(0, 0, paint.width, paint.height);
      for (let index = 0; index < pixels.data.length; index += 4) {
        pixels.data.set([255, 0, 128, pixels.data[index]], index);
      }
      brush.putImageData(pixels, 0, 0);
      show();
    };
    earlier.src = mask;
  };
  picture.src = image;
}
watch('value', load);
load();
"""

# Leaves room for the seeds of the other images of the click.
NEW_SEED = "() => Math.floor(Math.random() * 4e9)"
