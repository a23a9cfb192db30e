/* Asking the gateway. Addresses are relative, so that the pages also work below a path that a proxy adds. */

const ANSWER_MILLISECONDS = 10_000;

let ahead = 0; // milliseconds of the gateway's clock before this one

/** Return the time as the gateway has it, in milliseconds. */
export function now() {
  return Date.now() + ahead;
}

/** Return the answer to a GET request; throws when there is none, or it is an error. */
export async function get(path, headers = {}) {
  const asked = Date.now();
  const answer = await fetch(path, { headers, signal: AbortSignal.timeout(ANSWER_MILLISECONDS) });
  const date = Date.parse(answer.headers.get("date"));
  // The header is in whole seconds: closer than that the clocks need not be set.
  if (date && Math.abs(date + 500 - asked - ahead) > 2000) ahead = date + 500 - asked;
  if (!answer.ok) throw new Error(`${path}: status ${answer.status}`);
  return answer;
}

/** Call something now and then, a while after it has ended, while the page is seen; return how to do so at once. */
export function everyNowAndThen(milliseconds, work) {
  let timer = 0;
  let running = false;
  let again = false;
  async function run() {
    clearTimeout(timer);
    if (running) {
      again = true;
      return;
    }
    running = true;
    try {
      do {
        again = false;
        await work();
      } while (again);
    } finally {
      running = false;
      if (!document.hidden) timer = setTimeout(run, milliseconds);
    }
  }
  document.addEventListener("visibilitychange", () => {
    if (!document.hidden) void run();
  });
  void run();
  return () => void run();
}
