// SPDX-License-Identifier: MIT OR Apache-2.0
//
// Somebody else's packet program at the same device: it takes every packet for itself to decide, as
// the programs of container networks do, and may put a mark on it.

#include <linux/bpf.h>
#include <linux/pkt_cls.h>

#include <bpf/bpf_helpers.h>

const volatile __u32 mark = 0;

SEC("classifier")
int neighbour(struct __sk_buff *skb)
{
	skb->mark |= mark;
	return mark ? TC_ACT_UNSPEC : TC_ACT_OK;
}

// At the driver, which does nothing.
SEC("xdp")
int driver(struct xdp_md *packet)
{
	return XDP_PASS;
}

char _license[] SEC("license") = "Dual MIT/GPL";
