from variants import *
add('0.6B b1','0.6B',1,check=[[400],[1],[2],[257],[1500]])
add('0.6B b1 prof','0.6B',1,prof=True)
for f in (1,3,4): add(f'0.6B b1 fly {f}','0.6B',1,fly=f)
add('0.6B b1 stages 6','0.6B',1,stages=6)
import re as _re
def nohint(s): return s.replace('if (warp == 0) await(items + (size_t)lane * count / 32, number);\n    sync_computing();','')
add('0.6B b1 no hint','0.6B',1,edit=nohint)
EV='''
__device__ inline void copy_once(void* to, const void* global, u32 bytes, u64* bar) {
  u64 policy; asm volatile("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(policy));
  asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint"
               " [%0], [%1], %2, [%3], %4;"
               :: "r"(shared_address(to)), "l"(global), "r"(bytes), "r"(shared_address(bar)), "l"(policy) : "memory");
}
'''
def evict(s):
    i=s.index('__device__ constexpr int larger'); s=s[:i]+EV+s[i:]
    return s.replace('copy_in(s.ring[place.slot] + lane * PITCH','copy_once(s.ring[place.slot] + lane * PITCH')
add('0.6B b1 evict','0.6B',1,edit=evict)
add('0.6B b1 fly 3 evict','0.6B',1,edit=evict,fly=3)
add('0.6B b2','0.6B',2,check=[[400,37]])
add('0.6B b4','0.6B',4,check=[[400,0,257,1]])
add('0.6B b8','0.6B',8,check=[[400,0,257,1,38,700,2,256]])
add('0.6B b8 prof','0.6B',8,prof=True)
add('0.6B b8 fly 4','0.6B',8,fly=4)
add('0.6B b1 ctx 1500','0.6B',1,ctx=1500)
add('1B b1','1B',1,check=[[400]])
add('1B b4','1B',4,check=[[400,37,0,257]])
add('0.5B b1','0.5B',1,check=[[400]])
add('8B b1','8B',1)
add('8B b1 fly 4','8B',1,fly=4)
save()
