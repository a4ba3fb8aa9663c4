/* The load of the bench, one HTTP/1.1 client on one core:

       load again|once PORT CONNECTIONS WARM SECONDS CORE REQUEST

   `again` sends the bytes of the file REQUEST over each connection, and again when the answer is whole; `once` sends
   them once over each, a connection every millisecond, for streams that last longer than the measuring. It prints
   "begin" after WARM seconds, "end" after SECONDS more, and one line of JSON: answers, SSE events, seconds, the share
   of its time that it worked, and the microseconds from a request to the first event of its answer. Then it holds the
   connections until its standard input ends.

   It never sleeps while it measures: to wake it would be the server's work, several times that of an answer in a
   virtual machine. */

#define _GNU_SOURCE
#include <arpa/inet.h>
#include <errno.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <sched.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

enum { HEAD_LIMIT = 16 * 1024, READ_LIMIT = 256 * 1024, REQUEST_LIMIT = 64 * 1024, READY = 256 };
enum { GRACE = 60 }; /* seconds beyond its time until the alarm ends it */

struct link {
    int descriptor;
    int in_body, chunked, closes, first_seen;
    long left;           /* bytes of a body whose length is known, else -1 */
    size_t head_length;
    double asked;        /* when the request was sent */
    char last[5];        /* bytes of the body */
    char head[HEAD_LIMIT];
};

static struct sockaddr_in server;
static char request[REQUEST_LIMIT];
static size_t request_length;
static long answers, events;
static float *firsts; /* microseconds */
static size_t first_count, first_room;

static void fail(const char *what, const char *seen, size_t length)
{
    fprintf(stderr, "load: %s%.*s\n", what, (int)(length < 300 ? length : 300), seen);
    exit(1);
}

static double now(void)
{
    struct timespec time;
    clock_gettime(CLOCK_MONOTONIC, &time);
    return time.tv_sec + time.tv_nsec / 1e9;
}

static void ask(struct link *link)
{
    link->in_body = link->chunked = link->closes = link->first_seen = 0;
    link->left = -1;
    link->head_length = 0;
    memset(link->last, 0, sizeof link->last);
    link->asked = now();
    if (send(link->descriptor, request, request_length, MSG_NOSIGNAL) != (ssize_t)request_length)
        fail("cannot send: ", strerror(errno), 300);
}

static void open_link(struct link *link, int poll)
{
    struct epoll_event interest = { .events = EPOLLIN, .data.ptr = link };
    int yes = 1;

    link->descriptor = socket(AF_INET, SOCK_STREAM, 0);
    if (link->descriptor < 0 || connect(link->descriptor, (struct sockaddr *)&server, sizeof server) < 0)
        fail("cannot connect: ", strerror(errno), 300);
    setsockopt(link->descriptor, IPPROTO_TCP, TCP_NODELAY, &yes, sizeof yes);
    epoll_ctl(poll, EPOLL_CTL_ADD, link->descriptor, &interest);
    ask(link);
}

/* Read the head at the start of link->head; its length, or 0 when it has not come yet. */
static size_t read_head(struct link *link)
{
    char *end = memmem(link->head, link->head_length, "\r\n\r\n", 4), *field;

    if (!end)
        return 0;
    if (strncmp(link->head, "HTTP/1.1 200", 12) && strncmp(link->head, "HTTP/1.0 200", 12))
        fail("under load came ", link->head, link->head_length);
    *end = 0; /* the fields are searched as text */
    if ((field = strcasestr(link->head, "\r\ncontent-length:")))
        link->left = atol(field + 17);
    link->chunked = strcasestr(link->head, "\r\ntransfer-encoding: chunked") != NULL;
    link->closes = link->head[7] == '0' || strcasestr(link->head, "\r\nconnection: close");
    link->in_body = 1;
    return end + 4 - link->head;
}

/* Count the events of an answer: each ends with two line feeds, and nothing else here has them. */
static void count_events(struct link *link, const char *data, size_t length)
{
    const char *at = data, *stop = data + length;

    if (!link->first_seen && memmem(data, length, "data:", 5)) {
        link->first_seen = 1;
        if (first_count == first_room) {
            first_room = first_room ? 2 * first_room : 65536;
            if (!(firsts = realloc(firsts, first_room * sizeof *firsts)))
                fail("no memory", "", 0);
        }
        firsts[first_count++] = (now() - link->asked) * 1e6;
    }
    while ((at = memchr(at, '\n', stop - at))) {
        if ((at == data ? link->last[4] : at[-1]) == '\n')
            events++;
        at++;
    }
}

/* Take what came; 1 when the answer is whole. */
static int take(struct link *link, const char *data, size_t length)
{
    if (!link->in_body) {
        size_t before = link->head_length, head;

        if (before + length > HEAD_LIMIT) {
            /* Behind a head comes much at once: only a head that is too long is an error. */
            memcpy(link->head + before, data, HEAD_LIMIT - before);
            link->head_length = HEAD_LIMIT;
        } else {
            memcpy(link->head + before, data, length);
            link->head_length += length;
        }
        if (!(head = read_head(link))) {
            if (link->head_length == HEAD_LIMIT)
                fail("a head without end: ", link->head, 300);
            return 0;
        }
        data += head - before;
        length -= head - before;
    }
    if (!length)
        return link->left == 0 && !link->closes;
    count_events(link, data, length);
    if (length >= sizeof link->last) {
        memcpy(link->last, data + length - sizeof link->last, sizeof link->last);
    } else {
        memmove(link->last, link->last + length, sizeof link->last - length);
        memcpy(link->last + sizeof link->last - length, data, length);
    }
    if (link->left >= 0 && (link->left -= length) < 0)
        fail("more came than the answer's length", "", 0);
    if (link->closes) /* then the end of the connection is the end of the answer */
        return 0;
    /* The last chunk comes last in what was read: there is never a second answer behind it. */
    return link->chunked ? !memcmp(link->last, "0\r\n\r\n", 5) : link->left == 0;
}

static void serve_link(struct link *link, int poll, int again)
{
    static char data[READ_LIMIT];
    ssize_t length = recv(link->descriptor, data, sizeof data, 0);
    int whole = length > 0 && take(link, data, length);

    if (length < 0)
        fail("a connection broke: ", strerror(errno), 300);
    if (!length) {
        if (!link->closes || link->left > 0)
            fail("a connection ended in the middle of an answer", "", 0);
        close(link->descriptor);
    }
    if (length && !whole)
        return;
    if (!again)
        fail("a stream ended while it was to be open", "", 0);
    answers++;
    if (length)
        ask(link);
    else
        open_link(link, poll);
}

static int by_value(const void *a, const void *b)
{
    float x = *(const float *)a, y = *(const float *)b;
    return (x > y) - (x < y);
}

static void print_result(double seconds, double worked)
{
    printf("{\"answers\": %ld, \"events\": %ld, \"seconds\": %.6f, \"load\": %.3f", answers, events, seconds,
           worked / seconds);
    if (first_count) {
        qsort(firsts, first_count, sizeof *firsts, by_value);
        printf(", \"first\": %.1f, \"first_p99\": %.1f", firsts[first_count / 2], firsts[first_count * 99 / 100]);
    }
    printf("}\n");
    fflush(stdout);
}

static void run(struct link *links, int count, int poll, int again, double warm, double seconds)
{
    struct epoll_event ready[READY];
    double start = now() + warm, at = now(), worked = 0, next = at;
    int opened = 0, measuring = 0;

    while (!measuring || at < start + seconds) {
        if (opened < count && (again || at >= next)) {
            open_link(links + opened++, poll);
            next += 1e-3;
        }
        int number = epoll_wait(poll, ready, READY, 0);
        at = now();
        for (int n = 0; n < number; n++)
            serve_link(ready[n].data.ptr, poll, again);
        if (number)
            worked += now() - at;
        if (!measuring && at >= start) {
            measuring = 1;
            puts("begin");
            fflush(stdout);
            answers = events = first_count = worked = 0;
            start = at;
        }
    }
    puts("end");
    fflush(stdout);
    print_result(at - start, worked);
}

int main(int count, char **argument)
{
    if (count != 8)
        fail("usage: load again|once PORT CONNECTIONS WARM SECONDS CORE REQUEST", "", 0);
    int connections = atoi(argument[3]), core = atoi(argument[6]);
    double warm = atof(argument[4]), seconds = atof(argument[5]);
    struct link *links = calloc(connections, sizeof *links);
    FILE *file = fopen(argument[7], "rb");
    cpu_set_t cores;

    if (!links || !file || !(request_length = fread(request, 1, sizeof request, file)))
        fail("no memory, or nothing in ", argument[7], 300);
    CPU_ZERO(&cores);
    CPU_SET(core, &cores);
    sched_setaffinity(0, sizeof cores, &cores);
    alarm(warm + seconds + GRACE);
    server.sin_family = AF_INET;
    server.sin_port = htons(atoi(argument[2]));
    server.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
    run(links, connections, epoll_create1(0), !strcmp(argument[1], "again"), warm, seconds);
    while (getchar() != EOF)
        ;
    return 0;
}
