// The order in which a rater sees prompts and videos. It follows from the study and the rater's name alone.

function seedOf(text) {
  let hash = 2166136261; // FNV-1a over UTF-16 units
  for (let i = 0; i < text.length; i++) hash = Math.imul(hash ^ text.charCodeAt(i), 16777619);
  return hash >>> 0;
}

// Uniform numbers in [0, 1): mulberry32.
function randomFrom(seed) {
  return () => {
    seed = (seed + 0x6d2b79f5) | 0;
    let mixed = Math.imul(seed ^ (seed >>> 15), seed | 1);
    mixed ^= mixed + Math.imul(mixed ^ (mixed >>> 7), mixed | 61);
    return ((mixed ^ (mixed >>> 14)) >>> 0) / 4294967296;
  };
}

function shuffled(values, random) {
  const found = [...values];
  for (let i = found.length - 1; i > 0; i--) {
    const other = Math.floor(random() * (i + 1));
    [found[i], found[other]] = [found[other], found[i]];
  }
  return found;
}

function orderFor(study, rater) {
  const random = randomFrom(seedOf(`${study.id}/${rater}`));
  const prompts = study.prompts.map((prompt) => ({ ...prompt, videos: shuffled(prompt.videos, random) }));
  return shuffled(prompts, random);
}
