import ctypes, sys, subprocess, re
SP='/work/gpuvenv/lib/python3.12/site-packages/nvidia/cu13/'
def ptx(src):
    n=ctypes.CDLL(SP+'lib/libnvrtc.so.13'); p=ctypes.c_void_p()
    n.nvrtcCreateProgram(ctypes.byref(p),src.encode(),b'k.cu',0,None,None)
    opts=[b'--gpu-architecture=compute_90',b'--std=c++17']
    rc=n.nvrtcCompileProgram(p,len(opts),(ctypes.c_char_p*len(opts))(*opts))
    sz=ctypes.c_size_t(); n.nvrtcGetProgramLogSize(p,ctypes.byref(sz)); b=ctypes.create_string_buffer(sz.value); n.nvrtcGetProgramLog(p,b)
    if b.value.strip(): print(b.value.decode()[:6000])
    if rc: sys.exit(rc)
    n.nvrtcGetPTXSize(p,ctypes.byref(sz)); b=ctypes.create_string_buffer(sz.value); n.nvrtcGetPTX(p,b)
    return re.sub(r'\.version \d\.\d','.version 8.3',b.value.decode(),1)
def defs(B,L,D,N,K,H,F,P=40,S=256,W=8,qk=1,bias=0,splits=None,stages=None,fly=2,blocks=128,eps='1e-6f',norope=0):
    if splits is None:
        splits=1
        while splits*2<=16 and splits*2*B*K<=blocks: splits*=2
    if stages is None:
        widest=max(D,N*H,F); pitch=2*widest+(0 if widest%64 else 64); st=8*2112
        g=N//K; union=max(8*8*B*8*4,4*((g+2)*H+8*g*H+16*g))
        rest=B*pitch+10*2*H+union+8*-(-(D//8)//blocks)*B*4+-(-D//256)*B*4+256
        stages=min(12,(232448-rest)//(st+16))
    d=dict(BATCH=B,LAYERS=L,HIDDEN=D,HEADS=N,KV_HEADS=K,HEAD_DIM=H,FFN=F,PAGES=P,PAGE=S,TABLE=W,EPS=eps,SCALE_LOG2E=f'{H**-.5*1.4426950408889634:.9g}f',QK_NORM=qk,QKV_BIAS=bias,NO_ROPE_BITS=f'{norope}ull',BLOCKS=blocks,SPLITS=splits,STAGES=stages,IN_FLIGHT=fly)
    return d
def source(d,kernel='/work/wt/kernel/pallas_kernels/decode_layers.cu',prim='/work/wt/kernel/pallas_kernels/primitives.cuh'):
    return ''.join(f'#define {k} {v}\n' for k,v in d.items())+open(prim).read()+open(kernel).read()
SH={'0.6B':(28,1024,16,8,128,3072),'1B':(16,2048,32,8,64,8192),'0.5B':(24,896,14,2,64,4864),'8B':(36,4096,32,8,128,12288),'1.7B':(28,2048,16,8,128,6144),'4B':(36,2560,32,8,128,9728)}
def mail_words(d):
    B,D,N,K,H,F,SP=(d[k] for k in 'BATCH HIDDEN HEADS KV_HEADS HEAD_DIM FFN SPLITS'.split())
    return (B*(D+(N+2*K)*H+SP*N*H+D+F))//2+B*N*(-(-SP//4)*4)

if __name__=='__main__':
    for name,B in [a.split(':') for a in sys.argv[1:]]:
        d=defs(int(B),*SH[name],qk=0 if name in('1B','0.5B') else 1,bias=name=='0.5B' and 1 or 0)
        print(name,B,'splits',d['SPLITS'],'stages',d['STAGES'])
        t=ptx(source(d)); open('/tmp/k.ptx','w').write(t)
        r=subprocess.run([SP+'bin/ptxas','-arch=sm_90','-v','/tmp/k.ptx','-o','/tmp/k.cubin'],capture_output=True,text=True); print(r.stdout[-500:],r.stderr[-900:])
