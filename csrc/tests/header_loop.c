/* The loop in the comment of greedy/greedy.h as a program; tests/csrc/test_csrc.py compares the two line by line. */
#include <greedy/greedy.h>
#include <stdio.h>

static unsigned long sum = 0;

static int give_up(const char *why) {
    fprintf(stderr, "%s\n", why);
    return 1;
}

static void show(const uint8_t *data, int width, int height) { sum += data[0] + (unsigned long)(width * height); }

int main(void) {
    int shown = 0;
    /* clang-format off */
    greedy_bundle *bundle;
    greedy_session *session;
    greedy_frame *frame;
    char why[256];
    if (greedy_bundle_open(&bundle, "sprites.bundle", NULL, why, sizeof why) < 0) return give_up(why);
    if (greedy_open(&session, bundle, 1, why, sizeof why) < 0) return give_up(why);
    greedy_set_prompt(session, "a red circle moving right slowly on a gray background", 1);
    while (shown < 240 && greedy_next_frame(session, &frame) == GREEDY_OK) {
        show(frame->data, frame->width, frame->height);
        greedy_frame_unref(&frame);
        ++shown;
    }
    greedy_close(&session);
    greedy_bundle_close(&bundle);
    /* clang-format on */
    return shown == 240 && sum > 0 ? 0 : 1;
}
