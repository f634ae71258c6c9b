// SPDX-License-Identifier: MIT OR Apache-2.0
//
// The shield: a FIN or RST that TCP would not act on never reaches conntrack. README.md in this
// folder tells how, docs/shield.md why.
//
// Runs at the ingress of a device, before IP. What it hides from conntrack it marks; nftables
// chains take the mark away and make it an ACK for as long as conntrack looks. TCP sees every packet
// as it came, but for the acknowledgement number of an RST without ACK, which means nothing.

#include <stdbool.h>
#include <stddef.h>

#include <linux/bpf.h>
#include <linux/if_ether.h>
#include <linux/if_packet.h>
#include <linux/in.h>
#include <linux/ip.h>
#include <linux/ipv6.h>
#include <linux/pkt_cls.h>

#include <bpf/bpf_endian.h>
#include <bpf/bpf_helpers.h>

// What became of a packet. The order is that of DECISIONS in mod.rs.
enum decision {
	FIN_LEARNED,
	FIN_HIDDEN,
	RST_SHOWN,
	RST_HIDDEN,
	DELAYED,
	FRAGMENT_DROPPED,
	NOT_LEARNED,
	NOT_READ,
	DECISIONS,
};

// The bit of skb->mark that means "hide this". Set before loading.
const volatile __u32 mark = 0;

// Guarded ports, one bit each.
struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, 65536 / 64);
	__type(key, __u32);
	__type(value, __u64);
} ports SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_PERCPU_ARRAY);
	__uint(max_entries, DECISIONS);
	__type(key, __u32);
	__type(value, __u64);
} decisions SEC(".maps");

// A connection that conntrack has seen a FIN for. It stands here until TCP has taken the FIN, which
// mostly is at once, or the socket is gone; a newcomer to the place looks whether that is so.
struct place {
	struct bpf_spin_lock lock;
	// 0 where it was never used.
	__u32 device;
	bool is_ipv4;
	// Our own first sequence number: it differs from that of the next connection with the same tuple.
	__u32 isn;
	struct bpf_sock_tuple tuple;
};

#define PLACES 8192

struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, PLACES);
	__type(key, __u32);
	__type(value, struct place);
} places SEC(".maps");

// So that no client can foresee which connections meet. Set before loading.
const volatile __u32 seed = 0;

// Sockets that conntrack has seen a FIN for and whose place is taken by another. Dies with the
// socket, so nobody can fill it; but to make and to free it costs more than all the rest.
struct {
	__uint(type, BPF_MAP_TYPE_SK_STORAGE);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__type(key, int);
	__type(value, __u32);
} fins SEC(".maps");

// The few fields of the kernel's own socket that no helper tells. The loader finds their places
// in the running kernel (CO-RE).
#define KERNEL __attribute__((preserve_access_index))

struct tcp_sack_block {
	__u32 end_seq;
} KERNEL;

struct tcp_options_received {
	__u8 num_sacks;
} KERNEL;

struct tcp_sock {
	__u32 snd_una;
	__u64 bytes_acked;
	__u32 rcv_nxt;
	__u32 rcv_wup;
	__u32 rcv_wnd;
	struct tcp_options_received rx_opt;
	struct tcp_sack_block selective_acks[4];
} KERNEL;

// Layout on the wire (RFC 9293); linux/tcp.h has another struct tcp_sock's name beside it.
struct tcp_header {
	__be16 source;
	__be16 dest;
	__be32 seq;
	__be32 ack;
	__u8 offset;
	__u8 flags;
	__be16 window;
	__be16 check;
	__be16 urgent;
};

#define TCP_FIN 0x01
#define TCP_SYN 0x02
#define TCP_RST 0x04
#define TCP_ACK 0x10

#define IP_MORE 0x2000
#define IP_OFFSET 0x1fff
#define IPV6_MORE 0x0001
#define IPV6_OFFSET 0xfff8

// Extension headers that are read. 64 of the shortest are 512 bytes.
#define HEADERS 64

#define VLAN_ID 0x0fff

struct packet {
	struct bpf_sock_tuple tuple;
	__u32 tuple_size;
	// From the network header.
	__u32 tcp_at;
	// Bytes of TCP, header included.
	__u32 tcp_length;
	bool first_fragment;
};

enum found { NO_TCP, TCP, TINY, UNREAD };

static __always_inline void count(__u32 decision)
{
	__u64 *times = bpf_map_lookup_elem(&decisions, &decision);

	if (times)
		*times += 1;
}

static __always_inline bool load(struct __sk_buff *skb, __u32 at, void *to, __u32 length)
{
	return bpf_skb_load_bytes_relative(skb, at, to, length, BPF_HDR_START_NET) == 0;
}

static __always_inline bool before(__u32 a, __u32 b)
{
	return (__s32)(a - b) < 0;
}

static __always_inline bool is_guarded(__be16 port)
{
	__u32 number = bpf_ntohs(port);
	__u32 word = number / 64;
	__u64 *bits = bpf_map_lookup_elem(&ports, &word);

	return bits && *bits >> number % 64 & 1;
}

// Whether a packet is none of ours at first sight: no TCP, or neither FIN nor RST where the flags
// are where they mostly are. For most packets these few steps are all that the shield costs.
static __always_inline bool is_ordinary(struct __sk_buff *skb)
{
	if (skb->protocol == bpf_htons(ETH_P_IP)) {
		struct {
			struct iphdr ip;
			struct tcp_header tcp;
		} both;

		return load(skb, 0, &both, sizeof(both)) &&
		       (both.ip.protocol != IPPROTO_TCP ||
			(both.ip.ihl == 5 &&
			 !(both.ip.frag_off & bpf_htons(IP_MORE | IP_OFFSET)) &&
			 !(both.tcp.flags & (TCP_FIN | TCP_RST))));
	}
	if (skb->protocol == bpf_htons(ETH_P_IPV6)) {
		struct {
			struct ipv6hdr ip;
			struct tcp_header tcp;
		} both;

		return load(skb, 0, &both, sizeof(both)) && both.ip.nexthdr == IPPROTO_TCP &&
		       !(both.tcp.flags & (TCP_FIN | TCP_RST));
	}
	return true;
}

static __always_inline enum found read_ipv4(struct __sk_buff *skb, struct packet *packet)
{
	struct iphdr ip;
	__u32 fragment, total;

	if (!load(skb, 0, &ip, sizeof(ip)))
		return NO_TCP;
	if (ip.protocol != IPPROTO_TCP)
		return NO_TCP;
	fragment = bpf_ntohs(ip.frag_off);
	if (fragment & IP_OFFSET)
		return NO_TCP;
	packet->first_fragment = fragment & IP_MORE;
	packet->tcp_at = ip.ihl * 4;
	// Zero for what GRO has joined beyond 64 KiB. The link header counts then, which does no harm.
	total = ip.tot_len ? bpf_ntohs(ip.tot_len) : skb->len;
	packet->tcp_length = total > packet->tcp_at ? total - packet->tcp_at : 0;
	packet->tuple.ipv4.saddr = ip.saddr;
	packet->tuple.ipv4.daddr = ip.daddr;
	packet->tuple_size = sizeof(packet->tuple.ipv4);
	return TCP;
}

static __always_inline enum found read_ipv6(struct __sk_buff *skb, struct packet *packet)
{
	struct ipv6hdr ip;
	__u32 at = sizeof(ip), end;
	__u8 next;

	if (!load(skb, 0, &ip, sizeof(ip)))
		return NO_TCP;
	end = sizeof(ip) + (ip.payload_len ? bpf_ntohs(ip.payload_len) : skb->len);
	next = ip.nexthdr;
	packet->first_fragment = false;
	for (int i = 0; i < HEADERS; i++) {
		struct {
			__u8 next;
			__u8 length;
			__be16 fragment;
		} header;

		if (next == IPPROTO_TCP) {
			packet->tcp_at = at;
			packet->tcp_length = end > at ? end - at : 0;
			__builtin_memcpy(packet->tuple.ipv6.saddr, &ip.saddr, sizeof(ip.saddr));
			__builtin_memcpy(packet->tuple.ipv6.daddr, &ip.daddr, sizeof(ip.daddr));
			packet->tuple_size = sizeof(packet->tuple.ipv6);
			return TCP;
		}
		if (next != IPPROTO_HOPOPTS && next != IPPROTO_ROUTING && next != IPPROTO_FRAGMENT &&
		    next != IPPROTO_AH && next != IPPROTO_DSTOPTS)
			return NO_TCP;
		// A first fragment must hold the whole chain of headers (RFC 7112).
		if (at + sizeof(header) > end || !load(skb, at, &header, sizeof(header)))
			return packet->first_fragment ? TINY : NO_TCP;
		if (next == IPPROTO_FRAGMENT) {
			__u32 fragment = bpf_ntohs(header.fragment);

			if (fragment & IPV6_OFFSET)
				return NO_TCP;
			packet->first_fragment |= fragment & IPV6_MORE;
			at += 8;
		} else if (next == IPPROTO_AH) {
			at += (header.length + 2) * 4;
		} else {
			at += (header.length + 1) * 8;
		}
		next = header.next;
	}
	return UNREAD;
}

// The sequence number right behind the window (tcp_receive_window in net/tcp.h).
static __always_inline __u32 window_end(struct tcp_sock *tcp)
{
	__u32 end = tcp->rcv_wup + tcp->rcv_wnd;

	return before(end, tcp->rcv_nxt) ? tcp->rcv_nxt : end;
}

// Whether TCP closes the socket at this RST (tcp_validate_incoming in net/ipv4/tcp_input.c): at
// the next byte; after a FIN also at the FIN; or at the end of the last selective
// acknowledgement.
static __always_inline bool closes(struct tcp_sock *tcp, __u32 state, __u32 seq, __u32 payload)
{
	__u32 sacks = tcp->rx_opt.num_sacks;
	__u32 last = tcp->rcv_nxt;

	// Since 6.17 TCP refuses what reaches beyond the window.
	if (payload && before(window_end(tcp), seq + payload))
		return false;
	if (seq == tcp->rcv_nxt)
		return true;
	if (state == BPF_TCP_CLOSE_WAIT && seq == tcp->rcv_nxt - 1)
		return true;
#pragma unroll
	for (__u32 i = 0; i < 4; i++)
		if (i < sacks && before(last, tcp->selective_acks[i].end_seq))
			last = tcp->selective_acks[i].end_seq;
	return sacks && seq == last;
}

// Whether the last packet of the handshake may be in this very batch. With cookies there is nothing
// but the listener until then.
static __always_inline bool is_before_connection(__u32 state)
{
	return state == BPF_TCP_NEW_SYN_RECV || state == BPF_TCP_SYN_RECV ||
	       state == BPF_TCP_LISTEN;
}

static __always_inline __u32 own_isn(struct tcp_sock *tcp)
{
	return tcp->snd_una - (__u32)tcp->bytes_acked;
}

static __always_inline struct bpf_sock *find(struct __sk_buff *skb, struct bpf_sock_tuple *tuple,
					     bool is_ipv4)
{
	if (is_ipv4)
		return bpf_skc_lookup_tcp(skb, tuple, sizeof(tuple->ipv4), BPF_F_CURRENT_NETNS, 0);
	return bpf_skc_lookup_tcp(skb, tuple, sizeof(tuple->ipv6), BPF_F_CURRENT_NETNS, 0);
}

#define WORDS (sizeof(struct bpf_sock_tuple) / sizeof(__u32))

static __always_inline bool is_same(struct bpf_sock_tuple *one, struct bpf_sock_tuple *other)
{
	__u32 *a = (__u32 *)one, *b = (__u32 *)other, difference = 0;

#pragma unroll
	for (__u32 i = 0; i < WORDS; i++)
		difference |= a[i] ^ b[i];
	return !difference;
}

static __always_inline __u32 place_of(struct bpf_sock_tuple *tuple)
{
	__u32 *words = (__u32 *)tuple, hash = seed;

#pragma unroll
	for (__u32 i = 0; i < WORDS; i++) {
		hash = (hash ^ words[i]) * 0x9e3779b1;
		hash ^= hash >> 15;
	}
	return hash % PLACES;
}

// Is the place still in use? If its owner came by another device its socket cannot be looked up, so
// assume yes.
static __always_inline bool is_needed(struct __sk_buff *skb, struct place *place)
{
	struct bpf_sock *socket;
	struct tcp_sock *tcp;
	bool needed;

	if (!place->device)
		return false;
	if (place->device != skb->ifindex)
		return true;
	socket = find(skb, &place->tuple, place->is_ipv4);
	if (!socket)
		return false;
	tcp = bpf_skc_to_tcp_sock(socket);
	needed = tcp && socket->state == BPF_TCP_ESTABLISHED && own_isn(tcp) == place->isn;
	bpf_sk_release(socket);
	return needed;
}

// The first FIN of a connection is learned, every other hidden.
static __always_inline enum decision learn(struct __sk_buff *skb, struct packet *packet,
					   struct tcp_sock *tcp)
{
	__u32 number = place_of(&packet->tuple);
	__u32 *seen = bpf_sk_storage_get(&fins, tcp, NULL, 0);
	struct place *place, was = {};
	__u32 isn = own_isn(tcp);
	bool is_ours = false;

	if (seen && *seen)
		return FIN_HIDDEN;
	place = bpf_map_lookup_elem(&places, &number);
	if (place) {
		// Read without the lock: a torn value matches no socket, and the check under the lock
		// catches it.
		was.device = place->device;
		was.is_ipv4 = place->is_ipv4;
		was.isn = place->isn;
		was.tuple = place->tuple;
		if (was.isn == isn && is_same(&was.tuple, &packet->tuple))
			return FIN_HIDDEN;
		if (!is_needed(skb, &was)) {
			bpf_spin_lock(&place->lock);
			// No other processor was quicker.
			if (place->isn == was.isn && is_same(&place->tuple, &was.tuple)) {
				place->device = skb->ifindex;
				place->is_ipv4 = packet->tuple_size == sizeof(packet->tuple.ipv4);
				place->isn = isn;
				place->tuple = packet->tuple;
				is_ours = true;
			}
			bpf_spin_unlock(&place->lock);
			if (is_ours)
				return FIN_LEARNED;
		}
	}
	seen = bpf_sk_storage_get(&fins, tcp, NULL, BPF_SK_STORAGE_GET_F_CREATE);
	if (!seen)
		return NOT_LEARNED;
	if (*seen)
		return FIN_HIDDEN;
	*seen = 1;
	return FIN_LEARNED;
}

// A FIN of an open socket. Conntrack may see the first that TCP can use, and no other.
static __always_inline enum decision on_fin(struct __sk_buff *skb, struct packet *packet,
					    struct tcp_sock *tcp, __u32 state, __u32 seq,
					    __u32 payload)
{
	if (state == BPF_TCP_CLOSE_WAIT)
		return FIN_HIDDEN;
	// All of it old, or beyond the window: not a FIN to TCP. Were it learned, anybody who guesses
	// the ports could keep the real one from conntrack.
	if (!before(tcp->rcv_nxt, seq + payload + 1) || before(window_end(tcp), seq))
		return FIN_HIDDEN;
	return learn(skb, packet, tcp);
}

// An RST of an open socket. While it is ESTABLISHED, data or a FIN that came in the same batch
// may not have reached TCP yet: then judge again, once, behind the batch.
static __always_inline enum decision on_rst(struct tcp_sock *tcp, __u32 state, __u32 seq,
					    __u32 payload, bool again)
{
	if (state == BPF_TCP_ESTABLISHED && !again && !before(seq, tcp->rcv_nxt))
		return DELAYED;
	return closes(tcp, state, seq, payload) ? RST_SHOWN : RST_HIDDEN;
}

// An RST without ACK has any acknowledgement number, and to conntrack it will be an ACK: with a wrong
// number an invalid one, which strict rules drop. Where the packet does not begin as on Ethernet, nor
// with IP, it keeps its number.
static __always_inline void acknowledge(struct __sk_buff *skb, struct packet *packet,
					struct tcp_header *header, __be32 ack)
{
	struct tcp_header there;
	__u32 at = ETH_HLEN + packet->tcp_at;

	for (int i = 0; i < 2; i++) {
		if (!bpf_skb_load_bytes(skb, at, &there, sizeof(there)) &&
		    there.source == header->source && there.dest == header->dest &&
		    there.seq == header->seq && there.check == header->check) {
			bpf_l4_csum_replace(skb, at + offsetof(struct tcp_header, check), header->ack,
					    ack, sizeof(ack));
			bpf_skb_store_bytes(skb, at + offsetof(struct tcp_header, ack), &ack,
					    sizeof(ack), 0);
			return;
		}
		at = packet->tcp_at;
	}
}

static __always_inline int judge(struct __sk_buff *skb, bool again)
{
	struct packet packet = {};
	struct tcp_header header;
	struct bpf_sock *socket;
	struct tcp_sock *tcp;
	enum decision decision = DECISIONS;
	enum found found;
	__u32 seq, payload, header_length, state;
	__be32 ack = 0;
	bool is_ipv4;
	__u8 flags;

	// What goes on to a VLAN or macvlan device is judged there, and only there.
	if (skb->pkt_type == PACKET_OTHERHOST || (skb->vlan_present && skb->vlan_tci & VLAN_ID))
		return TC_ACT_UNSPEC;
	if (skb->protocol == bpf_htons(ETH_P_IP))
		found = read_ipv4(skb, &packet);
	else if (skb->protocol == bpf_htons(ETH_P_IPV6))
		found = read_ipv6(skb, &packet);
	else
		return TC_ACT_UNSPEC;
	if (found == NO_TCP)
		return TC_ACT_UNSPEC;
	if (found == UNREAD) {
		count(NOT_READ);
		return TC_ACT_UNSPEC;
	}
	// The flags would come in a later fragment (RFC 1858). Ports are in the first 4 bytes.
	if (found == TINY || (packet.first_fragment && packet.tcp_length < sizeof(header))) {
		if (found == TCP && (!load(skb, packet.tcp_at, &header, 4) || !is_guarded(header.dest)))
			return TC_ACT_UNSPEC;
		count(FRAGMENT_DROPPED);
		return TC_ACT_SHOT;
	}
	if (!load(skb, packet.tcp_at, &header, sizeof(header)))
		return TC_ACT_UNSPEC;
	// Other flags beside these make a packet that conntrack calls invalid, or TCP ignores.
	flags = header.flags & (TCP_FIN | TCP_SYN | TCP_RST | TCP_ACK);
	if (flags != (TCP_FIN | TCP_ACK) && (flags & ~TCP_ACK) != TCP_RST)
		return TC_ACT_UNSPEC;
	if (!is_guarded(header.dest))
		return TC_ACT_UNSPEC;
	header_length = (header.offset >> 4) * 4;
	if (packet.tcp_length < header_length)
		return TC_ACT_UNSPEC;
	payload = packet.tcp_length - header_length;
	seq = bpf_ntohl(header.seq);

	is_ipv4 = packet.tuple_size == sizeof(packet.tuple.ipv4);
	if (is_ipv4) {
		packet.tuple.ipv4.sport = header.source;
		packet.tuple.ipv4.dport = header.dest;
	} else {
		packet.tuple.ipv6.sport = header.source;
		packet.tuple.ipv6.dport = header.dest;
	}
	socket = find(skb, &packet.tuple, is_ipv4);
	if (!socket)
		return TC_ACT_UNSPEC;
	state = socket->state;
	tcp = bpf_skc_to_tcp_sock(socket);
	if (tcp && (state == BPF_TCP_ESTABLISHED || state == BPF_TCP_CLOSE_WAIT))
		decision = flags & TCP_FIN ? on_fin(skb, &packet, tcp, state, seq, payload)
					   : on_rst(tcp, state, seq, payload, again);
	else if (!again && is_before_connection(state))
		decision = DELAYED;
	if (tcp)
		ack = bpf_htonl(tcp->snd_una);
	bpf_sk_release(socket);
	if (decision == DECISIONS)
		return TC_ACT_UNSPEC;
	count(decision);
	if (decision == FIN_HIDDEN || decision == RST_HIDDEN)
		skb->mark |= mark;
	if (decision == RST_HIDDEN && !(flags & TCP_ACK))
		acknowledge(skb, &packet, &header, ack);
	if (decision == DELAYED) {
		skb->mark |= mark;
		return bpf_redirect(skb->ifindex, BPF_F_INGRESS);
	}
	return TC_ACT_UNSPEC;
}

SEC("classifier")
int ctkeep_shield(struct __sk_buff *skb)
{
	// Nothing on the wire can carry a mark: with our bit it is a packet that was delayed.
	bool again = skb->mark & mark;

	if (again)
		skb->mark &= ~mark;
	return is_ordinary(skb) ? TC_ACT_UNSPEC : judge(skb, again);
}

// Some of what it calls is for GPL-compatible programs alone, as MIT is one.
char _license[] SEC("license") = "Dual MIT/GPL";
